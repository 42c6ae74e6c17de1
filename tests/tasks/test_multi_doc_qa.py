"""Multi-document QA in the public format: the prompt to the byte, where distractors come from, and damaged files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import MultiDocumentQA, TaskError, best_subspan_em
from peft_layerrope.tasks import SPLIT_NAMES, Task, check_disjoint

PUBLIC = Path(__file__).parents[2] / "../shared/data/nq-open-oracle.jsonl.gz"
needs_public = pytest.mark.skipif(not PUBLIC.exists(), reason="the public data is not here")


def passage(name: str, gold: bool = False) -> dict:
    return {"title": f"T {name}", "text": f"About {name}.\nMore of it.", "isgold": gold, "hasanswer": gold}


def record(number: int, others: int = 0) -> dict:
    documents = [passage(f"other{number}x{i}") for i in range(others)]
    documents.insert(number % (others + 1), passage(f"gold{number}", gold=True))
    return {"question": f"what is {number}", "answers": [f"Gold{number}."], "ctxs": documents}


def write(path: Path, records: list) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def oracle(tmp_path) -> Path:
    return write(tmp_path / "oracle.jsonl.gz", [record(i) for i in range(30)])


@pytest.fixture
def complete(tmp_path) -> Path:
    return write(tmp_path / "complete.jsonl", [record(i, others=9) for i in range(20)])


def documents_of(text: str) -> list[str]:
    """The documents' names, after a check of everything around them."""
    head, tail = text.split("\n\nQuestion: ")
    before, listed = head.split("\n\n", 1)
    assert before == (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant)."
    )
    assert tail.endswith("\nAnswer:")
    names = []
    for number, document in enumerate(listed.split("\nDocument "), start=1):
        start, rest = document.removeprefix("Document ").split("](Title: T ", 1)
        name = rest.split(") About ", 1)[0]
        assert (start, rest) == (f"[{number}", f"{name}) About {name}.\nMore of it.")
        names.append(name)
    return names


def test_documents_of_the_file_are_numbered_as_they_stand(complete):
    task = MultiDocumentQA(tiny_bpe(), complete)
    assert isinstance(task, Task)
    assert task.positions == (0, 4, 9)
    assert task.describe()["distractors"] == "as in the file"
    for prompt in task.prompts("test", 8):
        names = documents_of(prompt.text)
        number = int(prompt.text.split("Question: what is ")[1].split("\n")[0])
        others = [f"other{number}x{i}" for i in range(9)]
        assert names == [*others[: prompt.position], f"gold{number}", *others[prompt.position :]]
        document = f"Document [{prompt.position + 1}](Title: T gold{number}) About gold{number}.\nMore of it."
        assert prompt.text[slice(*prompt.gold)] == document
        assert prompt.answers == (f"Gold{number}.",)


def test_a_prompt_to_the_byte(tmp_path):
    path = write(tmp_path / "qa.jsonl", [record(i, others=2) for i in range(5)])
    prompts = {p.answers: p for n in SPLIT_NAMES for p in MultiDocumentQA(tiny_bpe(), path).prompts(n, 1, [1])}
    number = int(next(iter(prompts))[0][4:-1])
    text = prompts[(f"Gold{number}.",)].text
    assert text == (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\n"
        f"Document [1](Title: T other{number}x0) About other{number}x0.\nMore of it.\n"
        f"Document [2](Title: T gold{number}) About gold{number}.\nMore of it.\n"
        f"Document [3](Title: T other{number}x1) About other{number}x1.\nMore of it.\n\n"
        f"Question: what is {number}\nAnswer:"
    )


@pytest.mark.parametrize(
    ("num_documents", "positions"),
    [
        (1, (0,)),
        (2, (0, 1)),
        (3, (0, 1, 2)),
        (None, (0, 4, 9)),
        (10, (0, 4, 9)),
        (15, (0, 3, 7, 10, 14)),
        (20, (0, 4, 9, 14, 19)),
        (30, (0, 4, 9, 14, 19, 24, 29)),
    ],
)
def test_gold_positions_are_the_published_ones(oracle, num_documents, positions):
    assert MultiDocumentQA(tiny_bpe(), oracle, num_documents=num_documents).positions == positions


def test_distractors_are_drawn_from_other_questions(oracle):
    task = MultiDocumentQA(tiny_bpe(), oracle, num_documents=10)
    assert task.describe()["distractors"] == "drawn from other questions' passages"
    for prompt in task.prompts("test", 12):
        names = documents_of(prompt.text)
        number = int(prompt.answers[0][4:-1])
        assert names[prompt.position] == f"gold{number}"
        assert len(set(names)) == 10
        # "Gold1." is told apart from "gold12" by no one who looks for a substring, so that is no distractor
        assert [name for name in names if f"gold{number}" in name] == [f"gold{number}"]
    again, other = (MultiDocumentQA(tiny_bpe(), oracle, num_documents=10, seed=s).prompts("test", 12) for s in (0, 1))
    assert again == task.prompts("test", 12)
    assert [p.text for p in other] != [p.text for p in again]


def test_fewer_documents_begin_with_the_same_distractors(oracle, complete):
    for path in (oracle, complete):
        long, short = (MultiDocumentQA(tiny_bpe(), path, num_documents=n).prompts("test", 5, [0]) for n in (9, 4))
        assert [documents_of(p.text)[:4] for p in long] == [documents_of(p.text) for p in short]


def test_questions_with_one_gold_passage_go_to_one_split(tmp_path):
    path = write(tmp_path / "qa.jsonl", [{**record(i // 3), "question": f"what is {i}"} for i in range(60)])
    task = MultiDocumentQA(tiny_bpe(), path, num_documents=3)
    golden = [{p.text[slice(*p.gold)] for p in task.prompts(name, 9, [0])} for name in SPLIT_NAMES]
    assert sum(map(len, golden)) == len(set.union(*golden))


def test_examples_stand_for_the_prompts_and_splits_are_disjoint(complete):
    tokenizer = tiny_bpe()
    task = MultiDocumentQA(tokenizer, complete)
    splits = [task.split(name, size) for name, size in (("search", 8), ("validation", 4), ("test", 8))]
    check_disjoint(splits)
    for example, prompt in zip(splits[2].examples, task.prompts("test", 8), strict=True):
        assert tokenizer.decode(example.context_ids + example.query_ids) == "<|bos|>" + prompt.text
        assert tokenizer.decode(example.answer_ids) == " " + prompt.answers[0]
        assert prompt.text[slice(*prompt.gold)] in tokenizer.decode(example.context_ids[slice(*example.gold_span)])
        assert best_subspan_em(f"It is {prompt.answers[0]}", example.answers)


def test_shortened_prompts_fit(oracle, complete):
    for path in (oracle, complete):
        task = MultiDocumentQA(tiny_bpe(), path)
        split = task.split("search", 8)
        short = task.shortened(split.max_tokens // 2).split("search", 8)
        assert short.max_tokens <= split.max_tokens // 2
        assert len(short.positions) == 3
        check_disjoint([split, short])


@needs_public
def test_the_public_file_holds_no_answer_outside_its_gold_document():
    task = MultiDocumentQA(tiny_bpe(), PUBLIC, num_documents=20)
    prompts = task.prompts("test", 300, [9])
    for prompt in prompts:
        start, stop = prompt.gold
        others = (prompt.text[:start] + prompt.text[stop:]).split("\n\nQuestion: ")[0]
        for document in others.split("\nDocument [")[1:]:
            shown = document.replace("\n", " ").split("](Title: ", 1)[1]
            assert not best_subspan_em(shown, prompt.answers), (prompt.answers, shown)


@needs_public
def test_a_question_that_leaves_no_distractors_is_passed_over():
    task = MultiDocumentQA(tiny_bpe(), PUBLIC, num_documents=30)
    counts = []
    for name in SPLIT_NAMES:
        with pytest.raises(TaskError) as caught:
            task.prompts(name, 2655)
        found = re.search(r"of its (\d+) questions only (\d+) leave 29 passages", str(caught.value))
        counts.append(tuple(map(int, found.groups())))
    # the answer "S" is found in every passage
    assert [sum(column) for column in zip(*counts, strict=True)] == [2655, 2654]


def changed(**changes: object) -> dict:
    return {**record(0), **changes}


DAMAGED = {
    "a field missing": ([{"question": "q", "answers": ["a"]}], "line 1: ctxs missing"),
    "no question": ([changed(question=None)], "line 1: question must be text, got None."),
    "one answer": ([changed(answers="a")], "line 1: answers must be a list of at least one text, got 'a'."),
    "no answers": ([changed(answers=[])], "line 1: answers must be a list"),
    "nothing to find": ([changed(answers=["The", "?"])], r"line 1: of its answers \['The', '\?'\] nothing is left"),
    "documents are no list": ([changed(ctxs={})], "line 1: ctxs must be a list of objects with title and text."),
    "no title": ([changed(ctxs=[{"text": "t", "isgold": True}])], "line 1: ctxs must be a list"),
    "no gold": ([changed(ctxs=[passage("a")])], r"line 1: 0 of its 1 documents are gold \(isgold\), expected 1."),
    "no documents": ([changed(ctxs=[])], "line 1: 0 of its 0 documents are gold"),
    "two gold": ([changed(ctxs=[passage("a", True), passage("b", True)])], "line 1: 2 of its 2 documents are gold"),
    "another size": ([record(0), record(1, 3)], "line 2: 4 documents, expected 1 as in the first record."),
    "one gold passage": ([record(0)] * 9, "has 9 records, 1 of them independent: too few"),
}


@pytest.mark.parametrize(("lines", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_records_are_named_by_file_and_line(lines, message, tmp_path):
    path = write(tmp_path / "qa.jsonl", lines)
    with pytest.raises(TaskError, match=message) as caught:
        MultiDocumentQA(tiny_bpe(), path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_documents": 0}, "num_documents=0 must be at least 1"),
        ({"num_documents": 11}, "num_documents=11, but the records of .* have 10 documents"),
        ({"positions": (0, 10)}, "gold position 10 is out of range: a context has 10 documents, 0 to 9."),
        ({"positions": (0,), "num_positions": 3}, "pass either num_positions or positions"),
    ],
)
def test_settings_that_cannot_work(complete, settings, message):
    with pytest.raises(TaskError, match=message):
        MultiDocumentQA(tiny_bpe(), complete, **settings)


def test_too_few_passages_are_counted(oracle):
    task = MultiDocumentQA(tiny_bpe(), oracle, num_documents=31)
    with pytest.raises(TaskError, match=r"of its 12 questions only 0 leave 30 passages without their answers, 1 were"):
        task.prompts("test", 1)
