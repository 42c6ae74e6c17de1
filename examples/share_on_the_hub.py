"""Shares an adapter on the Hub, and loads it from there as anyone can.

    hf auth login                                                         # once
    python examples/share_on_the_hub.py hub_configs/demo-plain my-name/demo-plain --private

The card, the report and the plots go up with the adapter's two files; checked before anything is sent. Whoever loads
it needs `import peft_layerrope` once, and the base model. On the command line: `layerrope push` and `layerrope pull`.
"""

from __future__ import annotations

import argparse

from peft import PeftModel
from transformers import AutoModelForCausalLM

import peft_layerrope  # tells PEFT about the adapter type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what `layerrope search` wrote")
    parser.add_argument("repo_id", help="where to: owner/name")
    parser.add_argument("--base", default=peft_layerrope.demo_model_path(), help="its base model; default: the demo's")
    parser.add_argument("--private", action="store_true", help="a repository that only you see")
    parser.add_argument("--license", help="such as apache-2.0; default: what the card says")
    args = parser.parse_args()

    commit = peft_layerrope.push_to_hub(args.folder, args.repo_id, private=args.private, license=args.license)
    print(f"uploaded: {commit.commit_url}")

    base = AutoModelForCausalLM.from_pretrained(args.base)
    model = PeftModel.from_pretrained(base, args.repo_id)
    print(f"loaded from the Hub, and measured on the model:\n{peft_layerrope.verify(model)}")


if __name__ == "__main__":
    main()
