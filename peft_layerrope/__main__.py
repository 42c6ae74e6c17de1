"""`python -m peft_layerrope` is the command `layerrope`."""

from .cli import run

if __name__ == "__main__":
    run()
