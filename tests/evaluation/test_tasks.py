"""Tasks: local records make the stock task's requests and answers; what cannot be asked is refused with a way out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks._index import TaskIndex
from tiny_run import small_config
from tiny_tasks import (
    DYNAMIC,
    FILES,
    GENERATION,
    MMLU,
    PER_TOKEN,
    RECORDS,
    STATIC,
    few_tasks,
    own_tasks,
    write_lines,
    write_sets,
)

from cushion import pipeline
from cushion.config import EvalConfig, PathsConfig, SearchConfig
from cushion.errors import ConfigError, CushionError, DataError
from cushion.evaluation import tasks as module
from cushion.evaluation.local_tasks import local_task_files
from cushion.evaluation.task_checks import check_tasks, task_batch_size
from cushion.evaluation.tasks import PAPER_TASKS, TaskSet, load_tasks
from cushion.models import LanguageModel

Tiny = Callable[..., LanguageModel]
whole_index = module._task_manager  # as it is before a fixture stands in for it
HUB = {
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "rte": ("nyu-mll/glue", "rte", "validation"),
    "copa": ("aps/super_glue", "copa", "validation"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "mmlu_abstract_algebra": ("cais/mmlu", "abstract_algebra", "test"),
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
}
"""Set and split on the hub that the stock definition reads and evaluates."""


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test with this fixture fails as soon as lm-eval reaches for the hub."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"the hub was asked for {arguments} {options}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def local(include_path: str, paths: PathsConfig, name: str, **options: Any) -> Any:
    """lm-eval's object for one task over local records."""
    return load_tasks(EvalConfig(tasks=[name], include_path=include_path, **options), paths).tasks[name].task


def stock(
    include_path: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    splits: dict[str, list[Any]],
    shots: int | None = None,
) -> Any:
    """lm-eval's own task, unmodified, with records handed to it in place of the hub's."""
    asked = []

    def give(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        asked.append((path, name))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", give)
        task = module._task_manager(include_path).load([name])["tasks"][name]
    assert asked == [HUB[name][:2]]
    task.set_config(key="num_fewshot", value=shots or 0)  # as lm-eval's own runner does it
    task.set_fewshot_seed(seed=1234)
    return task


def all_splits(name: str, records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records in the split that is evaluated, and the same ones upside down in the others."""
    others = dict.fromkeys(("train", "validation", "test"), records[::-1])
    return {**others, HUB[name][2]: records}


def requests(task: Any, limit: int | None = None) -> list[dict[str, Any]]:
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [
        {
            "arguments": one.args,
            "type": one.request_type,
            "record": one.doc_id,
            "number": one.idx,
            "repeats": one.repeats,
        }
        for one in task.instances
    ]


def answers(task: Any) -> list[Any]:
    return [[task.doc_to_target(record), task.doc_to_text(record)] for record in task.eval_docs]


def scored(task: Any) -> list[Any]:
    """What the task makes of some answers of a model: by metric, for the first, second, ... choice in turn."""
    found = []
    for number, record in enumerate(task.eval_docs):
        if task.OUTPUT_TYPE == "multiple_choice":
            count = len(task.doc_to_choice(record))
            results: list[Any] = [(-3.0 - (choice - number) % count, choice == number) for choice in range(count)]
        else:
            results = [-7.5 - number] if task.OUTPUT_TYPE == "loglikelihood_rolling" else [(-7.5 - number, number == 1)]
        found.append(task.process_results(record, results))
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    assert requests(ours) == requests(theirs)
    assert answers(ours) == answers(theirs)
    assert scored(ours) == scored(theirs)
    assert ours.VERSION == theirs.VERSION
    assert ours.higher_is_better() == theirs.higher_is_better()
    assert {name: function.__name__ for name, function in ours.aggregation().items()} == {
        name: function.__name__ for name, function in theirs.aggregation().items()
    }
    assert [one.name for one in ours._filters] == [one.name for one in theirs._filters]


# ---- local records make the stock task ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", [*PAPER_TASKS, "arc_challenge"])
def test_local_records_make_the_stock_tasks_requests_and_answers(
    tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ours = local(include_path, write_sets(tmp_path, name), name)
    theirs = stock(include_path, monkeypatch, name, all_splits(name, RECORDS[name]))
    assert_same(ours, theirs)
    assert len({one["record"] for one in requests(ours)}) == len(RECORDS[name])
    assert len(requests(ours)) >= len(RECORDS[name])
    assert {one["record"] for one in requests(ours, limit=2)} == {0, 1}


def test_the_seven_tasks_of_the_paper_ask_what_is_known_of_them(tmp_path: Path, include_path: str) -> None:
    """Against prompts written out by hand, so that not both sides of a comparison can be wrong alike."""
    paths = write_sets(tmp_path, *PAPER_TASKS)
    first = {name: requests(local(include_path, paths, name)) for name in PAPER_TASKS}
    lambada = "The keeper lit the lamp and climbed the stair to see the"
    assert first["lambada_openai"][0]["arguments"] == (lambada, " lamp")
    assert [one["arguments"] for one in first["copa"][:2]] == [
        ("The cup broke because", "  it fell."),  # the stock task has two spaces here
        ("The cup broke because", "  it flew."),
    ]
    assert [one["arguments"] for one in first["winogrande"][:2]] == [
        ("Ann beat Eve because Ann", " was fast."),
        ("Ann beat Eve because Eve", " was fast."),
    ]
    rte = "All dogs bark.\nQuestion: A dog barks. True or False?\nAnswer:"
    assert [one["arguments"] for one in first["rte"][:2]] == [(rte, " True"), (rte, " False")]
    assert first["piqa"][1]["arguments"] == ("Question: open a jar\nAnswer:", " turn the table")
    assert first["openbookqa"][0]["arguments"] == ("Ice melts when it is", " hot")
    roof = "Roof repair: A man is sitting on a roof. He"
    assert first["hellaswag"][0]["arguments"] == (roof, " sings a song.")
    assert first["hellaswag"][3]["arguments"] == (roof, "  Sleeps there.")


@pytest.mark.usefixtures("no_hub")
def test_hellaswag_records_that_are_processed_already_are_not_processed_again(
    tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = stock(include_path, monkeypatch, "hellaswag", all_splits("hellaswag", RECORDS["hellaswag"]))
    processed = [
        {"query": record["query"], "choices": record["choices"], "gold": record["gold"], "label": record["label"]}
        for record in theirs.eval_docs
    ]
    processed[0]["choices"][2] = "is [1]  a cube."  # what processing would change, and must stay here
    write_lines(tmp_path / FILES["hellaswag"], processed)
    ours = local(include_path, PathsConfig(data_dir=str(tmp_path)), "hellaswag")
    assert requests(ours)[2]["arguments"][1] == " is [1]  a cube."
    processed[0]["choices"][2] = "is a cube."
    write_lines(tmp_path / FILES["hellaswag"], processed)
    assert_same(local(include_path, PathsConfig(data_dir=str(tmp_path)), "hellaswag"), theirs)


@pytest.mark.usefixtures("no_hub")
def test_hellaswag_records_with_raw_fields_are_prepared_by_the_stock_task(
    tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody's preparation stands beside the raw fields; where it stands alone, it is taken."""
    theirs = stock(include_path, monkeypatch, "hellaswag", all_splits("hellaswag", RECORDS["hellaswag"]))
    elsewhere = {"query": "roof: he", "choices": ["a", "b", "c", "d"], "gold": 0}
    write_lines(tmp_path / FILES["hellaswag"], [{**record, **elsewhere} for record in RECORDS["hellaswag"]])
    config, paths = EvalConfig(tasks=["hellaswag"], include_path=include_path), PathsConfig(data_dir=str(tmp_path))
    both = load_tasks(config, paths).tasks["hellaswag"]
    assert_same(both.task, theirs)
    assert requests(both.task)[0]["arguments"][0].endswith("on a roof. He")
    assert not both.prepared
    write_lines(tmp_path / FILES["hellaswag"], [{**elsewhere, "label": "0"}])
    alone = load_tasks(config, paths).tasks["hellaswag"]
    assert alone.prepared
    assert requests(alone.task)[0]["arguments"] == ("roof: he", " a")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("shots", [None, 0, 2])
def test_local_mmlu_makes_the_stock_task_with_its_examples(
    tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, shots: int | None
) -> None:
    name = "mmlu_abstract_algebra"
    records = {
        split: [record for record in rows if record["subject"] == "abstract_algebra"] for split, rows in MMLU.items()
    }
    ours = local(include_path, write_sets(tmp_path, "mmlu"), name, shots=shots)
    theirs = stock(include_path, monkeypatch, name, {**records, "validation": records["test"][::-1]}, shots)
    assert_same(ours, theirs)
    asked = requests(ours)
    assert len(asked) == 8
    prompt = asked[0]["arguments"][0]
    assert prompt.startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\n")
    assert prompt.endswith("1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
    assert [f"0 + {number}?" in prompt for number in range(3)] == [bool(shots), bool(shots), False]
    assert prompt.count("Answer:") == 1 + (shots or 0)


@pytest.mark.usefixtures("no_hub")
def test_local_wikitext_makes_the_pages_of_the_stock_set(
    tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock set has one page for an article: its lines from the title to the one before the next title."""
    text = (
        ' \n = First Title = \n \n It is 3 @.@ 5 m , and n\'t ( more ) . \n = = A part = = \n \n " Two " rows . \n'
        " \n = Second = \n \n x = y \n = = = Deep = = = \n the end . \n \n"
    )
    pages = [
        ' = First Title = \n \n It is 3 @.@ 5 m , and n\'t ( more ) . \n = = A part = = \n \n " Two " rows . \n ',
        " = Second = \n \n x = y \n = = = Deep = = = \n the end . \n \n",
    ]
    path = tmp_path / "wikitext2_raw" / "wiki.test.raw"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    ours = local(include_path, PathsConfig(data_dir=str(tmp_path)), "wikitext")
    rows = [{"page": page} for page in pages]
    theirs = stock(include_path, monkeypatch, "wikitext", all_splits("wikitext", rows))
    assert [record["page"] for record in ours.eval_docs] == pages
    assert_same(ours, theirs)


@pytest.mark.usefixtures("no_hub")
def test_a_group_is_taken_apart_and_its_subjects_are_read_from_one_file(tmp_path: Path, include_path: str) -> None:
    subjects = sorted(
        entry.cfg["dataset_name"]
        for entry in module._task_manager(include_path).task_index.values()
        if entry.kind.name == "TASK" and "mmlu_stem_tasks" in entry.tags
    )
    assert len(subjects) == 19
    for split in ("test", "dev"):
        records = [
            {**MMLU[split][0], "subject": subject, "question": f"{split} {subject} {number}"}
            for number in range(1 if split == "dev" else 2)
            for subject in subjects
        ]
        write_lines(tmp_path / "mmlu" / f"{split}.jsonl", records)
    config = EvalConfig(tasks=["mmlu_stem"], include_path=include_path, limit=1)
    found = load_tasks(config, PathsConfig(data_dir=str(tmp_path)))
    assert found.asked == ("mmlu_stem",)
    assert set(found.tasks) == set(found.groups["mmlu_stem"].tasks) == {f"mmlu_{subject}" for subject in subjects}
    assert found.groups["mmlu_stem"].weighted
    for subject in subjects:
        questions = [record["question"] for record in found.tasks[f"mmlu_{subject}"].task.eval_docs]
        assert questions == [f"test {subject} 0", f"test {subject} 1"]
        assert found.tasks[f"mmlu_{subject}"].origin.startswith(str(tmp_path.resolve() / "mmlu" / "test.jsonl"))
    assert len({task.identity for task in found.tasks.values()}) == len(subjects)


def test_a_task_of_the_users_own_folder_is_read_from_there(tmp_path: Path, include_path: str) -> None:
    names = ["tiny_generation", "tiny_examples", "copa"]
    config = EvalConfig(tasks=names, include_path=include_path, shots=2)
    paths = write_sets(tmp_path, "copa")
    with pytest.raises(DataError, match=r"eval\.shots=2.*copa.*split 'train'"):
        load_tasks(config, paths)
    found = load_tasks(EvalConfig(tasks=names, include_path=include_path), paths)
    assert list(found.tasks) == names
    assert found.groups == {}
    asked = requests(found.tasks["tiny_generation"].task)
    assert asked[0]["arguments"][0] == "Q: one\nA:"
    assert asked[0]["arguments"][1] == {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    assert asked[0]["type"] == "generate_until"


def test_a_task_without_local_records_is_left_to_the_hub(
    tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = copy.deepcopy(RECORDS["arc_challenge"])

    def give(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        assert (path, name) == ("allenai/ai2_arc", "ARC-Easy")
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows)))

    monkeypatch.setattr(datasets, "load_dataset", give)
    config = EvalConfig(tasks=["arc_easy"], include_path=include_path)
    found = load_tasks(config, write_sets(tmp_path, "copa")).tasks["arc_easy"]
    assert found.origin == "hub:allenai/ai2_arc/ARC-Easy"
    assert len(requests(found.task)) == 11


def test_the_identity_of_a_task_is_that_of_what_it_asks(tmp_path: Path, include_path: str) -> None:
    def identity(records: list[dict[str, Any]], **options: Any) -> str:
        write_lines(tmp_path / FILES["copa"], records)
        config = EvalConfig(tasks=["copa"], include_path=include_path, **options)
        return load_tasks(config, PathsConfig(data_dir=str(tmp_path))).tasks["copa"].identity

    records = RECORDS["copa"]
    whole = identity(records)
    assert identity(records) == whole
    assert identity([*records[:2], {**records[2], "label": 1}]) != whole
    assert identity(records, limit=2) == identity(records[:2], limit=2) == identity(records[:2]) != whole


def test_the_files_a_run_may_read_are_named(tmp_path: Path) -> None:
    paths = PathsConfig(data_dir=str(tmp_path))
    assert local_task_files(EvalConfig(), paths) == []
    assert local_task_files(EvalConfig(tasks=["copa"]), PathsConfig()) == []
    found = local_task_files(EvalConfig(tasks=["copa"]), paths)
    expected = [*FILES.values(), "mmlu/dev.jsonl", "mmlu/test.jsonl", "wikitext2_raw/wiki.test.raw"]
    assert found == sorted(tmp_path / file for file in expected)


def test_a_run_is_another_one_when_a_task_file_changes(tmp_path: Path, text_file: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.eval.tasks, config.paths.data_dir = ["copa"], write_sets(tmp_path / "data", "copa").data_dir
    before = pipeline.run_folder(config)
    assert pipeline.run_folder(config) == before
    write_lines(tmp_path / "data" / FILES["copa"], RECORDS["copa"][:1])
    assert pipeline.run_folder(config) != before


# ---- what cannot be asked -------------------------------------------------------------------------------------------


def test_an_unknown_task_lists_near_names(include_path: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.tasks names 'helaswag'.*near names: .*hellaswag.*lm-eval ls tasks"):
        load_tasks(EvalConfig(tasks=["copa", "helaswag"][1:], include_path=include_path), PathsConfig())
    with pytest.raises(ConfigError, match=r"eval\.tasks names 'tiny_generatoin'.*tiny_generation"):
        load_tasks(EvalConfig(tasks=["tiny_generatoin"], include_path=include_path), PathsConfig())
    with pytest.raises(ConfigError, match=r"near names: none"):
        load_tasks(EvalConfig(tasks=["\u00e6\u00e6\u00e6\u00e6\u00e6\u00e6"], include_path=include_path), PathsConfig())


def test_a_mistake_in_a_task_of_the_users_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_task_manager", few_tasks)
    folder = Path(own_tasks(tmp_path))
    text = (folder / "examples.yaml").read_text()
    wrong = {
        r"task of its file below eval\.include_path \(UndefinedError: 'questoin' is undefined\)": (
            "question}",
            "questoin}",
        ),
        r"task of its file below .*include_path \(ValueError": ('["yes", "no"]', '"[yes, no]"'),
        r"unexpected keyword argument 'nonsense'": ("doc_to_target", "nonsense: 1\ndoc_to_target"),
        r"\(KeyError: 'validation'\): mend it there": ("test_split: test", "test_split: validation"),
        r"eval\.tasks=own_4, record 1: .* its answer 'label' is none of its 2 choices": ("answer", "label"),
        r"lm-eval cannot read .*own_5\.yaml, so its task is not known: .*line \d+": ("[{", "{["),
    }
    for number, (old, new) in enumerate(wrong.values()):
        mistaken = text.replace("tiny_examples", f"own_{number}").replace(old, new)
        (folder / f"own_{number}.yaml").write_text(mistaken)
    for number, message in enumerate(wrong):
        with pytest.raises(CushionError, match=message):
            load_tasks(EvalConfig(tasks=[f"own_{number}"], include_path=str(folder)), PathsConfig())


def test_a_task_that_scores_by_itself_may_have_any_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_task_manager", few_tasks)
    folder = Path(own_tasks(tmp_path))
    (folder / "own.py").write_text("def score(record, results):\n    return {'acc': 1.0}\n")
    text = (folder / "examples.yaml").read_text().replace("tiny_examples", "own")
    own = text.replace("doc_to_target: answer", "doc_to_target: nothing\nprocess_results: !function own.score")
    (folder / "own.yaml").write_text(own)
    found = load_tasks(EvalConfig(tasks=["own"], include_path=str(folder)), PathsConfig())
    assert found.tasks["own"].name == "own"


def test_an_include_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"eval\.include_path=.*nowhere.* is no folder: name one"):
        load_tasks(EvalConfig(tasks=["copa"], include_path=missing), PathsConfig())


def test_the_index_is_of_the_users_tasks_over_all_of_lm_evals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which folders are read, without reading them: lm-eval's own, then the user's, so that the user's wins."""
    read: list[list[Path]] = []
    monkeypatch.setattr(TaskIndex, "build", staticmethod(lambda paths: read.append(list(paths)) or {}))
    for own in (None, str(tmp_path)):
        whole_index.__wrapped__(own)
    stock = Path(lm_eval.tasks.__file__).parent
    assert read == [[stock], [stock, tmp_path]]


def test_no_task_needs_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_task_manager", None)
    found = load_tasks(EvalConfig(), PathsConfig())
    assert (found.asked, found.tasks, found.groups) == ((), {}, {})


def test_a_data_folder_that_is_none_is_refused(tmp_path: Path, include_path: str) -> None:
    with pytest.raises(DataError, match=r"paths\.data_dir=.*nowhere.* is not a folder"):
        local(include_path, PathsConfig(data_dir=str(tmp_path / "nowhere")), "copa")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", [*PAPER_TASKS, "arc_challenge", "mmlu_anatomy", "wikitext"])
def test_a_missing_file_is_named(tmp_path: Path, include_path: str, name: str) -> None:
    file = {"mmlu_anatomy": "mmlu/test.jsonl", "wikitext": "wikitext2_raw/wiki.test.raw", **FILES}[name]
    with pytest.raises(DataError, match=rf"no data file .*{file}"):
        local(include_path, PathsConfig(data_dir=str(tmp_path)), name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"premise": "a", ', r"line 2 is not a JSON record"),
        ("[1, 2]", r"line 2 is not a JSON record but list"),
        ('{"premise": "It.", "choice1": "a", "question": "cause", "label": 0}', r"line 2 has no field 'choice2', only"),
        ('{"premise": "It."}', r"line 2 has no field 'choice1', 'choice2', 'question', 'label', only \['premise'\]"),
    ],
)
def test_a_damaged_record_is_named_by_file_and_line(tmp_path: Path, include_path: str, line: str, message: str) -> None:
    path = write_lines(tmp_path / FILES["copa"], RECORDS["copa"][:1])
    path.write_text(path.read_text() + line + "\n" + json.dumps(RECORDS["copa"][1]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"copa/validation\.jsonl {message}"):
        local(include_path, PathsConfig(data_dir=str(tmp_path)), "copa")


def test_every_field_that_a_definition_reads_is_asked_for(tmp_path: Path, include_path: str) -> None:
    """A record without one of its fields is refused by name, whichever of the fields it is."""
    optional = {"hellaswag": {"ind", "ctx"}}
    for name in (*PAPER_TASKS, "arc_challenge"):
        for field in RECORDS[name][0]:
            if field in optional.get(name, ()):
                continue
            damaged = [RECORDS[name][0], {key: value for key, value in RECORDS[name][1].items() if key != field}]
            write_lines(tmp_path / FILES[name], damaged)
            with pytest.raises(DataError, match=rf"{FILES[name]} line 2 has no field '{field}'"):
                local(include_path, PathsConfig(data_dir=str(tmp_path)), name)


@pytest.mark.parametrize("field", ["subject", "question", "choices", "answer"])
def test_a_damaged_mmlu_record_is_named_by_file_and_line(tmp_path: Path, include_path: str, field: str) -> None:
    paths = write_sets(tmp_path, "mmlu")
    damaged = copy.deepcopy(MMLU["test"])
    del damaged[2][field]
    write_lines(tmp_path / "mmlu" / "test.jsonl", damaged)
    with pytest.raises(DataError, match=rf"mmlu/test\.jsonl line 3 has no field '{field}'"):
        local(include_path, paths, "mmlu_abstract_algebra")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("copa", {"label": "first"}),
        ("copa", {"question": "reason"}),
        ("rte", {"label": [0]}),
        ("winogrande", {"answer": "3"}),
        ("winogrande", {"sentence": "There is no gap."}),
        ("openbookqa", {"answerKey": "Z"}),
        ("hellaswag", {"label": "many"}),
        ("piqa", {"label": 7}),
        ("lambada_openai", {"text": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_record_that_the_definition_cannot_read_is_named_by_file_and_line(
    tmp_path: Path, include_path: str, name: str, change: dict[str, Any]
) -> None:
    write_lines(tmp_path / FILES[name], [RECORDS[name][0], {**RECORDS[name][1], **change}])
    with pytest.raises(DataError, match=rf"{FILES[name]}.*line 2"):
        local(include_path, PathsConfig(data_dir=str(tmp_path)), name)


@pytest.mark.parametrize("content", ["", "\n\n"], ids=["nothing", "blank lines"])
def test_a_file_without_records_is_refused(tmp_path: Path, include_path: str, content: str) -> None:
    write_lines(tmp_path / FILES["copa"], []).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"copa/validation\.jsonl holds no record: check the file"):
        local(include_path, PathsConfig(data_dir=str(tmp_path)), "copa")


def test_a_subject_without_records_is_refused(tmp_path: Path, include_path: str) -> None:
    with pytest.raises(DataError, match=r"mmlu/test\.jsonl holds no record with subject='virology'"):
        local(include_path, write_sets(tmp_path, "mmlu"), "mmlu_virology")


@pytest.mark.parametrize("name", ["copa", "hellaswag", "openbookqa", "wikitext"])
def test_examples_from_a_split_that_is_not_there_are_refused(tmp_path: Path, include_path: str, name: str) -> None:
    paths = PathsConfig(data_dir=str(tmp_path))
    if name == "wikitext":
        (tmp_path / "wikitext2_raw").mkdir()
        (tmp_path / "wikitext2_raw" / "wiki.test.raw").write_text(" \n = A = \n \n b \n", encoding="utf-8")
    else:
        write_sets(tmp_path, name)
    with pytest.raises(DataError, match=rf"eval\.shots=1.*{name}.*split 'train'.*eval\.shots=0"):
        local(include_path, paths, name, shots=1)
    assert local(include_path, paths, name, shots=0).get_config("num_fewshot") == 0


@pytest.mark.parametrize(("name", "shots"), [("mmlu_anatomy", 3), ("tiny_examples", 10)])
def test_more_examples_than_there_are_is_refused(tmp_path: Path, include_path: str, name: str, shots: int) -> None:
    """`mmlu_anatomy` has two examples here, `tiny_examples` nine."""
    paths = write_sets(tmp_path, "mmlu")
    assert local(include_path, paths, name, shots=shots - 1).get_config("num_fewshot") == shots - 1
    with pytest.raises((ConfigError, DataError), match=rf"eval\.shots={shots}.*{name}"):
        local(include_path, paths, name, shots=shots)


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), TimeoutError("too slow"), RuntimeError("odd"), OSError()]
)
def test_a_hub_that_does_not_answer_names_the_way_out(
    include_path: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    reason = str(error) or type(error).__name__
    message = rf"eval\.tasks=copa cannot be read: {reason} -- check the network, or set paths\.data_dir"
    with pytest.raises(DataError, match=message) as caught:
        load_tasks(EvalConfig(tasks=["copa"], include_path=include_path), PathsConfig())
    assert caught.value.__cause__ is error


def test_a_task_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.tasks=.*rte stands there more than once"):
        EvalConfig(tasks=["rte", "copa", "rte"])


def test_neither_perplexity_nor_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.perplexity=false.*name tasks in eval\.tasks"):
        EvalConfig(perplexity=False)
    EvalConfig(perplexity=False, tasks=["copa"])


@pytest.mark.parametrize(("key", "value"), [("limit", 0), ("task_batch_size", 0), ("shots", -1), ("accuracy", "f1")])
def test_values_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.{key}="):
        EvalConfig(tasks=["copa"], **{key: value})


def test_one_request_at_a_time_where_a_range_would_span_a_batch() -> None:
    config = EvalConfig(tasks=["copa"])
    assert [task_batch_size(config, quantizer, "cuda") for quantizer in (None, STATIC, PER_TOKEN)] == [8, 8, 8]
    assert task_batch_size(config, DYNAMIC, "cpu") == 1
    weights_only = copy.deepcopy(DYNAMIC)
    weights_only.activations.bits = None
    assert task_batch_size(config, weights_only, "cpu") == 8
    assert task_batch_size(EvalConfig(tasks=["copa"], task_batch_size=3), STATIC, "cuda") == 3


def test_the_largest_batch_is_looked_for_where_memory_says_that_it_is_full() -> None:
    config = EvalConfig(tasks=["copa"], task_batch_size="auto")
    assert [task_batch_size(config, STATIC, device) for device in ("cuda", "cpu", "mps")] == ["auto", 8, 8]
    assert task_batch_size(config, DYNAMIC, "cuda") == 1


def test_a_batch_under_a_dynamic_range_per_tensor_is_refused(tiny: Tiny) -> None:
    lm = tiny()
    for size in (1, None, "auto"):
        check_tasks(lm, EvalConfig(tasks=["copa"], task_batch_size=size), TaskSet((), {}, {}), DYNAMIC, 0)
    for quantizer in (STATIC, PER_TOKEN):
        check_tasks(lm, EvalConfig(tasks=["copa"], task_batch_size=4), TaskSet((), {}, {}), quantizer, 0)
    check_tasks(lm, EvalConfig(task_batch_size=4), TaskSet((), {}, {}), DYNAMIC, 0)  # no task, no batch
    message = r"eval\.task_batch_size=4 with quantizer=per_tensor_dynamic.*eval\.task_batch_size=1, auto or null"
    with pytest.raises(ConfigError, match=message):
        check_tasks(lm, EvalConfig(tasks=["copa"], task_batch_size=4), TaskSet((), {}, {}), DYNAMIC, 0)


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_a_prefix_that_leaves_no_room_is_refused(tiny: Tiny, family: str) -> None:
    lm, config = tiny(family), EvalConfig(tasks=["copa"])
    check_tasks(lm, config, TaskSet((), {}, {}), STATIC, 254)
    if family == "bloom":  # no limit of its own
        check_tasks(lm, config, TaskSet((), {}, {}), STATIC, 300)
        return
    with pytest.raises(ConfigError, match=r"a prefix of up to 255 tokens leaves no room.*256 positions.*shorten"):
        check_tasks(lm, config, TaskSet((), {}, {}), STATIC, 255)


def test_a_run_refuses_before_any_long_work(tmp_path: Path, text_file: Path, include_path: str) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.eval = EvalConfig(
        perplexity=False, block_length=32, activation_blocks=2, tasks=["copa"], include_path=include_path
    )
    config.paths.data_dir = write_sets(tmp_path / "data", "copa").data_dir
    config.quantizer.calibration.length = 2
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=[65] * 255)
    with pytest.raises(ConfigError, match=r"a prefix of up to 255 tokens.*shorten"):
        pipeline.run(config)
    assert not (tmp_path / "out" / "cache").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [("unsafe_code: true", "runs code that the model writes"), ("doc_to_image: question", "shows images")],
)
def test_a_task_that_cannot_be_asked_here_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, told: str
) -> None:
    (tmp_path / "own.yaml").write_text(f"{GENERATION.format(folder=own_tasks(tmp_path / 'records'))}\n{option}\n")
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(module, "_task_manager", lambda _: manager)
    config = EvalConfig(tasks=["tiny_generation"], include_path=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"eval\.tasks=tiny_generation {told}, which is not supported: leave it out"):
        check_tasks(tiny(), config, load_tasks(config, PathsConfig()), STATIC, 0)
