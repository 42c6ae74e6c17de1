"""Multi-document QA in the public format: the prompt to the byte, where distractors come from, and damaged files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_bpe

from peft_layerrope import KeyValueRetrieval, MultiDocumentQA, TaskError, best_subspan_em
from peft_layerrope.searcher.evaluator import probes, times_dearer
from peft_layerrope.tasks.base import SPLIT_NAMES, Task, check_disjoint
from peft_layerrope.tasks.prompts import ASKED_EVERYWHERE, GOLD_MOVES

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
    splits = [task.split(name, size) for name, size in (("search", 6), ("validation", 3), ("test", 8))]
    check_disjoint(splits)
    assert [len(split.examples[0].query_ids) > 1 for split in splits] == [True, True, False]
    for example, prompt in zip(splits[2].examples, task.prompts("test", 8), strict=True):
        assert tokenizer.decode(example.context_ids + example.query_ids) == "<|bos|>" + prompt.text
        assert tokenizer.decode(example.answer_ids) == " " + prompt.answers[0]
        assert prompt.text[slice(*prompt.gold)] in tokenizer.decode(example.context_ids[slice(*example.gold_span)])
        assert best_subspan_em(f"It is {prompt.answers[0]}", example.answers)


def test_shortened_prompts_fit(oracle, complete):
    for path in (oracle, complete):
        task = MultiDocumentQA(tiny_bpe(), path)
        split = task.split("search", 6)
        short = task.shortened(split.max_tokens // 2).split("search", 6)
        assert short.max_tokens <= split.max_tokens // 2
        assert len(short.positions) == 3
        check_disjoint([split, short])


def asked_by_group(prompts: list) -> dict[int, list]:
    found: dict[int, list] = {}
    for prompt in prompts:
        found.setdefault(prompt.group, []).append(prompt)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["search", "validation"])
@pytest.mark.parametrize("source", ["oracle", "complete"])
def test_a_search_context_is_asked_for_a_question_at_every_position(oracle, complete, source, name, seed):
    settings = {"num_documents": 7} if source == "oracle" else {}
    task = MultiDocumentQA(tiny_bpe(), {"oracle": oracle, "complete": complete}[source], seed=seed, **settings)
    count = len(task.positions)
    groups = asked_by_group(task.prompts(name, {"search": 6, "validation": count}[name]))
    held_out = {p.question for p in task.prompts("test", 8)}
    for members in groups.values():
        assert [p.position for p in members] == list(task.positions)
        contexts = {p.text.split("\n\nQuestion: ")[0] for p in members}
        assert len(contexts) == 1
        documents = documents_of(members[0].text)
        assert len(set(documents)) == len(documents) == task.num_items
        numbers = [int(p.question.removeprefix("what is ")) for p in members]
        assert len(set(numbers)) == count
        assert [documents[p.position] for p in members] == [f"gold{n}" for n in numbers]
        for prompt, number in zip(members, numbers, strict=True):
            assert prompt.answers == (f"Gold{number}.",)
            assert prompt.text.endswith(f"\n\nQuestion: what is {number}\nAnswer:")
            assert f"](Title: T gold{number}) " in prompt.text[slice(*prompt.gold)]
            others = [d for d in documents if d != f"gold{number}"]
            assert not any(best_subspan_em(f"T {d} About {d}. More of it.", prompt.answers) for d in others)
            assert prompt.question not in held_out


@pytest.mark.parametrize("source", ["oracle", "complete"])
def test_questions_rotate_over_the_positions(oracle, complete, source):
    """A Latin square: in one round of contexts every question stands at every position once."""
    settings = {"num_documents": 7} if source == "oracle" else {}
    task = MultiDocumentQA(tiny_bpe(), {"oracle": oracle, "complete": complete}[source], **settings)
    count = len(task.positions)
    groups = list(asked_by_group(task.prompts("search", 2 * count if count == 3 else count)).values())
    rounds = [groups[i : i + count] for i in range(0, len(groups), count)]
    seen = []
    for members in rounds:
        places = {(p.question, p.position) for group in members for p in group}
        questions = {question for question, _ in places}
        assert len(questions) == count
        assert places == {(question, position) for question in questions for position in task.positions}
        seen += sorted(questions)
    assert len(set(seen)) == len(seen)  # no question in two rounds


@pytest.mark.parametrize(("name", "groups"), [("search", 6), ("validation", 3), ("test", 6)])
def test_examples_share_their_context_where_it_is_asked_everywhere(complete, name, groups):
    tokenizer = tiny_bpe()
    split = MultiDocumentQA(tokenizer, complete).split(name, groups)
    assert split.protocol == (GOLD_MOVES if name == "test" else ASKED_EVERYWHERE)
    assert split.describe()["protocol"] == split.protocol
    contexts = {(e.group, e.context_ids) for e in split.examples}
    assert len(contexts) == groups * (len(split.positions) if name == "test" else 1)
    for example in split.examples:
        asked = tokenizer.decode(example.query_ids)
        assert asked == ":" if name == "test" else asked.endswith(example.question.split()[-1] + "\nAnswer:")


def test_the_test_split_keeps_the_public_protocol(oracle):
    """One question a context, whose gold document moves while all else stays."""
    task = MultiDocumentQA(tiny_bpe(), oracle, num_documents=7)
    groups = asked_by_group(task.prompts("test", 10))
    assert len({members[0].question for members in groups.values()}) == 10
    for members in groups.values():
        (question,) = {p.question for p in members}
        gold = "gold" + question.removeprefix("what is ")
        without = {tuple(d for d in documents_of(p.text) if d != gold) for p in members}
        assert len(without) == 1
        assert all(documents_of(p.text)[p.position] == gold for p in members)


def test_a_search_of_answerable_questions_leaves_the_other_splits_alone(oracle):
    task = MultiDocumentQA(tiny_bpe(), oracle, num_documents=7, num_positions=3)
    known = [question.number for question in task.questions("search")][::2]
    some = task.with_answerable(known)
    asked = {p.question for p in some.prompts("search", 3)}
    assert asked <= {f"what is {number}" for number in known}
    assert some.prompts("test", 5) == task.prompts("test", 5)
    assert some.prompts("validation", 3) == task.prompts("validation", 3)
    assert len(task.questions("search")) == 12
    assert some.describe()["answerable_search_questions"] == len(known)
    with pytest.raises(TaskError, match=r"its 6 questions make \d contexts of 3 questions each, 99 were asked for"):
        some.prompts("search", 99)


@needs_public
def test_public_search_contexts_answer_each_question_once():
    task = MultiDocumentQA(tiny_bpe(), PUBLIC, num_documents=20)
    for members in asked_by_group(task.prompts("search", 30)).values():
        listed = members[0].text.split("\n\nQuestion: ")[0].split("\n\n", 1)[1]
        documents = ["Document [" + d for d in listed.removeprefix("Document [").split("\nDocument [")]
        assert len(set(d.split("]", 1)[1] for d in documents)) == len(documents) == 20
        for prompt in members:
            for place, document in enumerate(documents):
                shown = document.replace("\n", " ").split("](Title: ", 1)[1]
                assert place == prompt.position or not best_subspan_em(shown, prompt.answers)


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
            task.prompts(name, 2655, [0])  # single questions, whose gold document moves
        found = re.search(r"of its (\d+) questions only (\d+) leave 29 passages", str(caught.value))
        counts.append(tuple(map(int, found.groups())))
    # the answer "S" is found in every passage
    assert [sum(column) for column in zip(*counts, strict=True)] == [2655, 2654]


def changed(**changes: object) -> dict:
    return {**record(0), **changes}


DAMAGED = {
    "a field missing": ([{"question": "q", "answers": ["a"]}], "line 1: ctxs is missing"),
    "no question": ([changed(question=None)], "line 1: question=None must be a valid string"),
    "one answer": ([changed(answers="a")], "line 1: answers='a' must be"),
    "no answers": ([changed(answers=[])], "line 1: answers.* at least 1 item"),
    "nothing to find": ([changed(answers=["The", "?"])], r"line 1: of answers=\('The', '\?'\) nothing is left"),
    "documents are no list": ([changed(ctxs={})], "line 1: ctxs={} must be"),
    "no title": ([changed(ctxs=[{"text": "t", "isgold": True}])], "line 1: ctxs.0..title is missing"),
    "no gold": ([changed(ctxs=[passage("a")])], r"line 1: 0 of its 1 documents are gold \(isgold\), expected 1."),
    "no documents": ([changed(ctxs=[])], "line 1: 0 of its 0 documents are gold"),
    "two gold": ([changed(ctxs=[passage("a", True), passage("b", True)])], "line 1: 2 of its 2 documents are gold"),
    "another size": ([record(0), record(1, 3)], "line 2: a context of 4 items, expected 1 as in the first record."),
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
    ],
)
def test_settings_that_cannot_work(complete, settings, message):
    with pytest.raises(TaskError, match=message):
        MultiDocumentQA(tiny_bpe(), complete, **settings)


def test_too_few_passages_are_counted(oracle):
    task = MultiDocumentQA(tiny_bpe(), oracle, num_documents=31)
    with pytest.raises(TaskError, match=r"of its 12 questions only 0 leave 30 passages without their answers, 1 were"):
        task.prompts("test", 1)


def test_a_plan_knows_that_a_test_runs_each_of_its_prompts_twice(oracle):
    task = MultiDocumentQA(tiny_bpe(), oracle, num_documents=4)
    *_, tested = probes(task)
    assert (tested.protocol, task.protocol("test")) == (ASKED_EVERYWHERE, GOLD_MOVES)
    shared = len(tested.examples[0].context_ids)
    asked = {e.query_ids + e.answer_ids for e in tested.examples}
    once = shared + sum(len(tokens) - 1 for tokens in asked)
    apart = sum(e.num_tokens - 1 for e in task.split("test", 1).examples)
    assert times_dearer(task, tested) == pytest.approx(2 * apart / once)
    alike = KeyValueRetrieval(tiny_bpe(), num_keys=8)
    assert times_dearer(alike, probes(alike)[-1]) == 1.0
