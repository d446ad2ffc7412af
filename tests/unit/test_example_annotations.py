"""The parts of the annotations example that need no worker."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from examples.annotations import cli, demo, documents, parsing, store, validation
from examples.annotations.documents import InvalidLine, reference

ROOT = Path(__file__).parents[2]


# Reading


def identity(line: str) -> tuple[str, str, int | str | None]:
    found = reference(line, 1)
    return found.sourcedb, found.sourceid, found.divid


def read(path: Path) -> tuple[list[documents.Reference], list[documents.RejectedLine]]:
    rejected: list[documents.RejectedLine] = []
    return list(documents.read(path, rejected.append)), rejected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"sourcedb": "PMC", "sourceid": "1", "divid": 3, "text": "a"}', ("PMC", "1", 3)),
        ('{"text":"a","divid":"3","sourceid":"1","sourcedb":"PMC"}', ("PMC", "1", 3)),
        ('{"sourcedb":"PMC","sourceid":"1"}', ("PMC", "1", None)),
        ('{"sourcedb":"PMC","sourceid":"1","divid":null}', ("PMC", "1", None)),
        ('{"sourcedb":"PMC","sourceid":17,"divid":"methods"}', ("PMC", "17", "methods")),
        ('{"sourcedb":"PMC","sourceid":"1","divid":"03"}', ("PMC", "1", "03")),
        (' \t{ "sourcedb" : "PMC" ,\r "sourceid" : "1" } ', ("PMC", "1", None)),
        (r'{"source\u0064b":"P\u004dC","sourceid":"\"1\\"}', ("PMC", '"1\\', None)),
        ('{"sourcedb":"Müller","sourceid":"日本"}', ("Müller", "日本", None)),
        (r'{"sourcedb":"\ud83d\ude00","sourceid":"1"}', ("😀", "1", None)),
    ],
)
def test_a_line_says_whose_document_it_is_in_any_order_and_spelling(
    line: str, expected: tuple[str, str, int | str | None]
) -> None:
    assert identity(line.strip()) == expected


def test_only_top_level_keys_count() -> None:
    nested = '{"sourcedb":"no","a":[{"sourceid":"no","divid":9}],"b":{"divid":8}}'
    line = f'{{"x":{nested},"sourcedb":"PMC","y":[{nested}],"sourceid":"1","z":{nested}}}'
    assert identity(line) == ("PMC", "1", None)


def test_of_a_key_that_occurs_twice_the_last_counts_as_in_json() -> None:
    line = '{"sourcedb":"A","sourceid":"1","sourcedb":"B"}'
    assert identity(line)[0] == json.loads(line)["sourcedb"] == "B"


def test_keys_inside_strings_are_no_keys() -> None:
    text = json.dumps('{"sourcedb": "no", "sourceid": [[[ \\ "')
    assert identity(f'{{"text":{text},"sourcedb":"PMC","a":[{text}],"sourceid":"1"}}') == ("PMC", "1", None)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"sourceid": ', "[ \t"])
@pytest.mark.parametrize("before", [True, False])
def test_whose_a_document_is_can_be_read_at_any_depth(opening: str, before: bool) -> None:
    depth = 300_000
    closing = "".join("]" if bracket == "[" else "}" for bracket in reversed(opening) if bracket in "[{")
    deep = f'"attributes":{opening * depth}1{closing * depth}'
    known = '"sourcedb":"PMC","sourceid":"1","divid":2'
    members = [known, deep] if before else [deep, known]
    assert identity("{" + ",".join(members) + "}") == ("PMC", "1", 2)


@pytest.mark.parametrize(
    "filling",
    [
        pytest.param("[" * 2_500_000 + "]" * 2_500_000, id="deep"),
        pytest.param('["' + '\\"' * 2_500_000 + '"]', id="escaped"),
        pytest.param("[" + "[]," * 1_600_000 + "1]", id="flat"),
    ],
)
def test_five_megabytes_are_scanned_in_seconds(filling: str) -> None:
    started = time.perf_counter()
    assert identity(f'{{"attributes":{filling},"sourcedb":"PMC","sourceid":"1"}}') == ("PMC", "1", None)
    assert time.perf_counter() - started < 20, "measured: at most 2.4 s"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('"sourcedb"', "not a JSON object"),
        ("{", "missing"),
        ("{}", "no sourcedb"),
        ('{"sourcedb":"PMC"}', "no sourceid"),
        ('{"sourcedb":"PMC","sourceid":""}', "no sourceid"),
        ('{"sourcedb":null,"sourceid":"1"}', "no sourcedb"),
        ('{"sourcedb":["PMC"],"sourceid":"1"}', "sourcedb is neither"),
        ('{"sourcedb":true,"sourceid":"1"}', "sourcedb is neither"),
        ('{"sourcedb":"PMC","sourceid":"1","divid":1.5}', "divid is neither"),
        ('{"sourcedb":"PMC","sourceid":nonsense}', "sourceid is not JSON"),
        ('{"sourcedb":"PMC","sourceid":' + "9" * 5000 + "}", "sourceid is not JSON"),
        ('{"sourcedb":"PMC","sourceid":"' + "x" * 256 + '"}', "longer than 255"),
        (r'{"sourcedb":"\ud800","sourceid":"1"}', "no database stores"),
        (r'{"sourcedb":"a\u0000","sourceid":"1"}', "no database stores"),
        ('{"sourcedb":"PMC","sourceid":"1"', "missing"),
        ('{"sourcedb":"PMC","sourceid":"1"} {}', "more text"),
        ('{"sourcedb":"PMC","sourceid":"1",}', "string is missing"),
        ('{"sourcedb":"PMC" "sourceid":"1"}', "',' is missing"),
        ('{"sourcedb":"PMC","sourceid":"1","a":}', "a value is missing"),
        ('{"sourcedb":"PMC","sourceid":"1","a":[[1]', "inside a nested value"),
        ('{"sourcedb":"PMC","sourceid":"1","a":["b]}', "does not end"),
        ('{"sourcedb":"PMC","sourceid":"1', "does not end"),
    ],
)
def test_a_line_that_is_no_document_says_why(line: str, reason: str) -> None:
    with pytest.raises(InvalidLine, match=reason):
        reference(line, 1)


def test_bad_lines_are_counted_with_their_numbers_and_lose_no_others(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"sourcedb":"A","sourceid":"1"}\r\n'
        b"\n   \r\n"
        b"nonsense\n"
        b'{"sourcedb":"A","sourceid":"\xff"}\n'
        b'{"sourcedb":"A","sourceid":"\0"}\n'
        + '{"sourcedb":"A","sourceid":"2","text":"a\u2028b"}\n'.encode()
        + b'{"sourcedb":"A","sourceid":"3","text":nonsense}'
    )
    found, rejected = read(path)
    assert [(r.sourceid, r.line_number) for r in found] == [("1", 1), ("2", 7), ("3", 8)]
    assert found[0].line == '{"sourcedb":"A","sourceid":"1"}'
    assert [r.line_number for r in rejected] == [4, 5, 6]
    assert "UTF-8" in rejected[1].reason
    assert "NUL" in rejected[2].reason


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    assert read(path) == ([], [])


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(documents.UnreadableInput, match=r"no file .*absent"):
        documents.check_readable(tmp_path / "absent")
    with pytest.raises(documents.UnreadableInput, match="is a folder"):
        documents.check_readable(tmp_path)


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (99, [5])])
def test_batches_keep_documents_whole_and_in_order(size: int, expected: list[int]) -> None:
    five = [reference(f'{{"sourcedb":"A","sourceid":"{n}"}}', n) for n in range(5)]
    parts = list(documents.batches(five, size))
    assert [len(part) for part in parts] == expected
    assert [document for part in parts for document in part] == five


def test_batches_take_no_document_before_it_is_asked_for() -> None:
    taken = []

    def references():  # type: ignore[no-untyped-def]
        for number in range(100):
            taken.append(number)
            yield reference(f'{{"sourcedb":"A","sourceid":"{number}"}}', number)

    parts = documents.batches(references(), 3)
    assert taken == []
    next(parts)
    assert taken == [0, 1, 2]


def test_a_batch_of_no_documents_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        next(documents.batches([], 0))


# Parsing


def nested(depth: int) -> str:
    return '{"attributes":' + "[" * depth + "]" * depth + "}"


def run_parser(depth: int, prelude: str = "") -> subprocess.CompletedProcess[str]:
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
{prelude}
from examples.annotations.parsing import parse
depth = {depth}
parse('{{"attributes":' + "[" * depth + "]" * depth + "}}")
print("survived")
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_an_ordinary_document_is_parsed() -> None:
    assert parsing.parse('{"text": "a", "divid": 0}') == {"text": "a", "divid": 0}


@pytest.mark.parametrize("depth", [1, 100, 800, 999])
def test_below_a_thousand_levels_a_document_is_parsed(depth: int) -> None:
    limit = sys.getrecursionlimit()
    found = parsing.parse(nested(depth))["attributes"]
    for _ in range(depth - 1):
        (found,) = found
    assert found == []
    assert sys.getrecursionlimit() == limit


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 guards every thread's stack")
@pytest.mark.parametrize("depth", [50_000, 100_000, 2_000_000])
def test_from_fifty_thousand_levels_on_the_parser_kills_its_process(depth: int) -> None:
    process = run_parser(depth)
    assert process.returncode == -11, process.stderr
    assert "survived" not in process.stdout


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 guards every thread's stack")
def test_the_death_is_the_same_under_faulthandler_and_in_a_thread() -> None:
    assert run_parser(50_000, "import faulthandler; faulthandler.enable()").returncode == -11


@pytest.mark.parametrize("line", ["", "{", "[]", "1", '{"a": NaN}', '{"a": Infinity}', '{"a": "\t"}'])
def test_what_is_no_json_object_is_a_value_error(line: str) -> None:
    with pytest.raises(ValueError):
        parsing.parse(line)


def test_broken_json_at_a_depth_the_guard_refuses_is_a_value_error() -> None:
    depth = sys.getrecursionlimit() + 100
    with pytest.raises(ValueError):
        parsing.parse('{"attributes":' + "[" * depth + "x")


# Checking


def document(**changes: object) -> dict[str, object]:
    valid: dict[str, object] = {
        "sourcedb": "PMC",
        "sourceid": "1",
        "text": "Fever and cough.",
        "denotations": [
            {"id": "T2", "span": {"begin": 10, "end": 15}, "obj": "Symptom"},
            {"id": "T1", "span": {"begin": 0, "end": 5}, "obj": "Symptom"},
        ],
        "attributes": [{"id": "A1", "subj": "T1", "pred": "severity", "obj": 3}],
        "relations": [{"id": "R1", "subj": "T1", "pred": "with", "obj": "T2"}],
    }
    return {**valid, **changes}


def with_span(begin: object, end: object) -> dict[str, object]:
    return document(
        denotations=[{"span": {"begin": begin, "end": end}, "obj": "x"}], attributes=[], relations=[]
    )


def test_a_valid_document_has_no_problems() -> None:
    assert validation.validate(document()) == []
    assert validation.validate({"text": ""}) == []
    assert validation.validate(with_span(0, 16)) == []
    assert validation.validate(with_span(16, 16)) == []


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"text": None}, "text is missing"),
        ({"text": 5}, "text is not a string"),
        ({"denotations": {}}, "denotations is not a list"),
        ({"denotations": None}, "denotations is not a list"),
        ({"denotations": [7]}, "denotation 0 is not an object"),
        ({"denotations": [{"obj": "x"}]}, "denotation 0 has no span"),
        ({"denotations": [{"obj": "x", "span": []}]}, "denotation 0 has no span"),
        ({"denotations": [{"span": {"begin": 0, "end": 1}}]}, "denotation 0 has no obj"),
        (
            {"denotations": [{"span": {"begin": 0, "end": 1}, "obj": "x", "id": {}}]},
            "the id of denotations 0",
        ),
        ({"attributes": [[[[]]]]}, "attribute 0 is not an object"),
        ({"attributes": [{"subj": "T9", "pred": "p", "obj": 1}]}, "attribute 0: its subj is no annotation"),
        ({"attributes": [{"subj": ["T1"], "pred": "p", "obj": 1}]}, "attribute 0: its subj is no annotation"),
        ({"attributes": [{"subj": "T1", "obj": 1}]}, "attribute 0 has no pred"),
        ({"relations": [{"subj": "T1", "pred": "p", "obj": "T9"}]}, "relation 0: its obj is no annotation"),
        ({"relations": [{"id": "T1", "subj": "T1", "pred": "p", "obj": "T2"}]}, "the id 'T1' occurs twice"),
    ],
)
def test_a_broken_document_names_its_problem(broken: dict[str, object], problem: str) -> None:
    assert any(found.startswith(problem) for found in validation.validate(document(**broken)))


@pytest.mark.parametrize(
    ("begin", "end", "problem"),
    [
        (0, 17, "outside the text"),
        (-1, 3, "outside the text"),
        (5, 3, "after its end"),
        ("0", 3, "not both integers"),
        (True, 3, "not both integers"),
        (0, 3.0, "not both integers"),
        (None, 3, "not both integers"),
        pytest.param(0, 10**6000, "outside the text", id="thousands of digits"),
    ],
)
def test_a_span_that_does_not_fit_the_text_is_a_problem(begin: object, end: object, problem: str) -> None:
    (found,) = validation.validate(with_span(begin, end))
    assert problem in found


def test_a_discontinuous_denotation_has_several_spans() -> None:
    spans = [{"begin": 0, "end": 2}, {"begin": 3, "end": 99}]
    (found,) = validation.validate(
        document(denotations=[{"span": spans, "obj": "x"}], attributes=[], relations=[])
    )
    assert "3-99 is outside" in found


def test_only_the_first_problems_are_listed() -> None:
    broken = document(denotations=[None] * 1000, attributes=[], relations=[])
    assert len(validation.validate(broken)) == validation.MAX_PROBLEMS


def test_the_normal_form_is_ordered_and_complete_and_keeps_text_and_spans() -> None:
    raw = document(divid="7", text=" Fever and cough. \n")
    del raw["denotations"][0]["id"], raw["attributes"][0]["id"]  # type: ignore[index]
    raw["relations"] = []
    normal = validation.normalise(raw)
    assert normal["divid"] == 7
    assert normal["text"] == raw["text"]
    assert [(d["id"], d["span"]["begin"]) for d in normal["denotations"]] == [("T1", 0), ("T2", 10)]
    assert normal["attributes"][0]["id"] == "A1"
    assert validation.validate(normal) == []


def test_a_given_id_is_not_given_twice() -> None:
    span = {"begin": 0, "end": 1}
    raw = {"text": "ab", "denotations": [{"span": span, "obj": "x"}, {"id": "T1", "span": span, "obj": "x"}]}
    assert sorted(d["id"] for d in validation.normalise(raw)["denotations"]) == ["T1", "T2"]


def test_normalising_twice_changes_nothing() -> None:
    once = validation.normalise(document(divid="7"))
    assert validation.normalise(once) == once


def test_objects_are_annotations_of_all_kinds() -> None:
    assert validation.count_objects(document()) == 4
    assert validation.count_objects({"text": ""}) == 0


# Storing


@pytest.fixture
def output(tmp_path: Path) -> str:
    url = store.output_url(str(tmp_path / "annotations.db"))
    store.create_tables(url)
    return url


def row(sourceid: str = "1", **changes: object) -> store.StoredDocument:
    values: dict[str, object] = {
        "sourcedb": "PMC", "sourceid": sourceid, "divid": "", "status": store.STORED, "text_length": 3,
        "objects": 1, "body": "{}", "problem": None, "upload_id": "u1",
    }  # fmt: skip
    return store.StoredDocument(**{**values, **changes})  # type: ignore[arg-type]


def rows(url: str, table: sa.Table) -> list[sa.RowMapping]:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = list(connection.execute(sa.select(table).order_by(*table.primary_key)).mappings())
    engine.dispose()
    return found


def test_a_document_written_twice_is_one_row_of_the_later_version(output: str) -> None:
    store.write_documents(output, [row("2"), row("1"), row("1", divid="0")])
    store.write_documents(output, [row("1", body='{"a":1}', upload_id="u2"), row("1", body='{"a":2}')])
    store.write_documents(output, [])
    assert [(r["sourceid"], r["divid"], r["body"]) for r in rows(output, store.documents)] == [
        ("1", "", '{"a":2}'), ("1", "0", "{}"), ("2", "", "{}"),
    ]  # fmt: skip


def test_an_invalid_version_does_not_replace_a_stored_one_but_is_replaced_by_it(output: str) -> None:
    invalid = {"status": store.INVALID, "problem": "broken", "body": "?"}
    store.write_documents(output, [row("1"), row("2", **invalid)])
    store.write_documents(output, [row("1", **invalid), row("2")])
    assert {(r["status"], r["body"], r["problem"]) for r in rows(output, store.documents)} == {
        ("stored", "{}", None)
    }


def test_an_upload_is_summed_up_with_its_rejected_lines(output: str) -> None:
    store.open_upload(output, "b1", "u1", "input.jsonl", rejected=2)
    (opened,) = rows(output, store.uploads)
    assert (opened["status"], opened["times_written"], opened["total"]) == ("running", 0, 2)
    store.finish_upload(output, "b1", "partial", store.Summary(total=10, stored=6, invalid=1, crashed=3))
    (written,) = rows(output, store.uploads)
    assert [written[k] for k in ("total", "stored", "invalid", "crashed", "times_written")] == [
        12,
        6,
        3,
        3,
        1,
    ]
    assert written["status"] == "partial"
    assert written["written_at"] is not None


def test_invalid_documents_are_listed_for_their_upload_only(output: str) -> None:
    invalid = {"status": store.INVALID, "problem": "broken"}
    store.write_documents(output, [row(str(n), **invalid) for n in range(5)])
    store.write_documents(output, [row("x", upload_id="u2", **invalid), row("y")])
    assert [r["sourceid"] for r in store.invalid_documents(output, "u1", limit=3)] == ["0", "1", "2"]


def _write_many(url: str, first: int) -> None:
    store.create_tables(url)
    for number in range(first, first + 20):
        store.write_documents(url, [row(str(number % 25)), row("shared")])


def test_forked_processes_create_and_write_at_once(tmp_path: Path) -> None:
    url = store.output_url(str(tmp_path / "annotations.db"))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_write_many, args=(url, 10 * n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(rows(url, store.documents)) == 26


def test_an_output_that_cannot_be_opened_says_which_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(store.OutputUnavailable, match=r"absent/a\.db cannot be used.*--output"):
        store.create_tables(store.output_url(str(tmp_path / "absent" / "a.db")))
    with pytest.raises(store.OutputUnavailable) as raised:
        store.create_tables("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only files")
def test_a_read_only_output_says_so(output: str) -> None:
    Path(sa.make_url(output).database or "").chmod(0o444)
    with pytest.raises(store.OutputUnavailable, match="read"):
        store.write_documents(output, [row()])


def test_an_output_is_a_file_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.output_url("a.db") == f"sqlite:///{tmp_path}/a.db"
    assert store.output_url("sqlite:///a.db") == f"sqlite:///{tmp_path}/a.db"
    assert store.output_url("postgresql://h/d") == "postgresql+psycopg://h/d"
    for refused in ("mysql://h/d", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ValueError):
            store.output_url(refused)


# The command and the demo


def test_the_command_has_the_documented_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = cli.parse_arguments(["in.jsonl"])
    assert (options.batch_size, options.concurrency) == (25, 2)
    assert (options.broker, options.report, options.timeout) == (None, None, None)
    assert options.output == f"sqlite:///{tmp_path}/annotations.db"
    assert options.database == f"sqlite:///{tmp_path}/batchtrack.db"


def test_the_tracking_database_lies_beside_the_output(tmp_path: Path) -> None:
    options = cli.parse_arguments(["in.jsonl", "--output", str(tmp_path / "x" / "out.db")])
    assert options.database == f"sqlite:///{tmp_path}/x/batchtrack.db"


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["in.jsonl", "--batch-size", "0"],
        ["in.jsonl", "--concurrency", "many"],
        ["in.jsonl", "--timeout", "nan"],
        ["in.jsonl", "--database", "mysql://h/d"],
        ["in.jsonl", "--output", "mysql://h/d"],
        ["in.jsonl", "--json", "/no/such/folder/report.json"],
        ["in.jsonl", "--jsn", "x"],
    ],
)
def test_wrong_usage_ends_with_2_and_a_message(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(wrong) == 2
    assert "error:" in capsys.readouterr().err


def test_the_report_has_the_documented_form() -> None:
    report = cli.Report(
        name="upload x", batch_id="b1", status="partial", summary=store.Summary(10, 7, 2, 1), failed=0,
        crashed=[], callbacks=1, seconds=1.23456, rejected=[documents.RejectedLine(4, "not a JSON object")],
    )  # fmt: skip
    written = report.as_dict()
    assert {"batch_id", "status", "documents", "crashed", "callbacks", "seconds"} <= written.keys()
    assert written["documents"] == {"total": 10, "stored": 7, "invalid": 2, "crashed": 1}
    assert written["callbacks"] == 1
    assert "10 documents: 7 stored, 2 invalid, 1 crashed" in str(report)
    assert "line 4: not a JSON object" in str(report)


def test_the_demo_makes_valid_documents_two_that_kill_and_one_that_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "sample.jsonl"
    demo.write_sample(path)
    found, rejected = read(path)
    assert rejected == []
    assert len({(r.sourcedb, r.sourceid, r.divid) for r in found}) == len(found) == demo.DOCUMENTS
    harmless = {n: parsing.parse(r.line) for n, r in enumerate(found) if n not in demo.KILLERS}
    assert [n for n, parsed in harmless.items() if validation.validate(parsed)] == [demo.OUT_OF_TEXT]
    assert sum(map(validation.count_objects, harmless.values())) > 500
    for killer in demo.KILLERS:
        assert found[killer].line.count("[") > demo.KILLING_DEPTH
