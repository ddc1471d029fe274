"""Text for the four purposes: never overlapping, cut exactly, in a seeded order, and refused by file and line."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_run import file_data

from cushion.chats import chat_text
from cushion.config import CorpusConfig, DataConfig, PathsConfig
from cushion.data import SHARES, Corpus, load_corpora
from cushion.errors import DataError
from cushion.models import LanguageModel
from cushion.models.tiny import byte_tokenizer
from cushion.sources import local_files
from cushion.text_files import has_fields, read_documents

Tiny = Callable[..., LanguageModel]


def documents(count: int, words: int = 40, name: str = "d") -> list[str]:
    """Documents of which no two windows of text are equal: every word carries its place."""
    return [" ".join(f"{name}{index}w{word}" for word in range(words)) for index in range(count)]


def written(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def four(evaluation: Path, calibration: Path, tuning: Path, search: Path) -> DataConfig:
    paths = (evaluation, calibration, tuning, search)
    return DataConfig("file", *(CorpusConfig("file", path=str(path)) for path in paths))


# ---- sharing out --------------------------------------------------------------------------------------------------


def test_purposes_that_share_a_file_divide_it_by_documents(tmp_path: Path) -> None:
    pool = documents(100)
    corpora = load_corpora(file_data(written(tmp_path / "a.txt", pool)), PathsConfig())
    assert list(corpora) == ["evaluation", "calibration", "tuning", "search"]
    assert [document for corpus in corpora.values() for document in corpus.documents] == pool
    total = sum(SHARES.values())
    for purpose, corpus in corpora.items():
        share = sum(map(len, corpus.documents)) / sum(map(len, pool))
        assert share == pytest.approx(SHARES[purpose] / total, abs=0.02)
        assert corpus.provenance["shared_by"] == list(corpora)


def test_further_corpora_are_purposes_of_their_own(tmp_path: Path) -> None:
    pool, other = documents(120), documents(8, name="other")
    config = file_data(written(tmp_path / "a.txt", pool))
    path = str(tmp_path / "a.txt")
    config.further = {
        "same": CorpusConfig("file", path=path),
        "other": CorpusConfig("file", path=str(written(tmp_path / "b.txt", [*other, pool[0]]))),
    }
    corpora = load_corpora(config, PathsConfig())
    assert list(corpora)[:3] == ["evaluation", "further.same", "further.other"]
    assert corpora["further.other"].documents == other, "what the evaluation has claimed is not counted twice"
    shared = [purpose for purpose in corpora if purpose != "further.other"]
    assert [text for purpose in shared for text in corpora[purpose].documents] == pool
    size = {purpose: sum(map(len, corpora[purpose].documents)) for purpose in shared}
    assert size["further.same"] == pytest.approx(size["evaluation"], rel=0.1)
    assert set(load_corpora(config, PathsConfig(), {"further.same"})) == {"further.same"}


def test_a_document_that_two_sources_repeat_stays_with_the_first_purpose(tmp_path: Path) -> None:
    mine, other = documents(12), documents(12, name="e")
    first = written(tmp_path / "a.txt", mine)
    second = written(tmp_path / "b.txt", [mine[3] + "  ", *other, mine[7], mine[8]])
    corpora = load_corpora(four(first, second, second, second), PathsConfig())
    sets = {purpose: {text.strip() for text in corpus.documents} for purpose, corpus in corpora.items()}
    for one, two in combinations(sets, 2):
        assert not sets[one] & sets[two], (one, two)
    assert set().union(*sets.values()) == set(mine) | set(other)
    assert sum(int(str(corpus.provenance["duplicates_dropped"])) for corpus in corpora.values()) == 3


def test_a_document_that_one_source_repeats_does_not_cross_purposes(tmp_path: Path) -> None:
    pool = documents(30)
    repeated = [*pool, *pool[:3]]  # the first documents belong to evaluation, their copies lie in the search's share
    corpora = load_corpora(file_data(written(tmp_path / "a.txt", repeated)), PathsConfig())
    sets = [set(corpus.documents) for corpus in corpora.values()]
    assert all(not one & two for one, two in combinations(sets, 2))
    assert pool[0] in sets[0]


def test_a_file_with_too_few_documents_for_all_purposes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", documents(2))
    with pytest.raises(DataError, match=r"data\.calibration .*no document left .*has 2 documents"):
        load_corpora(file_data(path), PathsConfig())


def test_two_fields_of_one_file_are_two_sources(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ours, theirs = documents(20, name="ours"), documents(20, name="theirs")
    path.write_text("\n".join(json.dumps({"x": x, "y": y}) for x, y in zip(ours, theirs, strict=True)))
    corpora = [CorpusConfig("file", path=str(path), text_field=field) for field in ("x", "y", "y", "y")]
    found = load_corpora(DataConfig("file", *corpora), PathsConfig())
    assert found["evaluation"].documents == ours
    assert [text for purpose in ("calibration", "tuning", "search") for text in found[purpose].documents] == theirs


def test_provenance_names_the_source_and_hashes_its_text(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", documents(30))
    corpus = load_corpora(file_data(path), PathsConfig())["tuning"]
    text = "\n\n".join(corpus.documents)
    assert corpus.provenance["origin"] == str(path.resolve())
    assert corpus.provenance["documents"] == len(corpus.documents)
    assert corpus.provenance["characters"] == sum(map(len, corpus.documents))
    assert corpus.provenance["sha256"] == hashlib.sha256(text.encode()).hexdigest()


# ---- what a run does not need -------------------------------------------------------------------------------------

SUBSETS = [set(chosen) for size in (1, 2, 3) for chosen in combinations(SHARES, size)]


@pytest.mark.parametrize("repeats", [False, True], ids=["all different", "with repeats"])
def test_a_purposes_share_is_the_same_whatever_else_is_needed(tmp_path: Path, repeats: bool) -> None:
    pool = documents(60)
    if repeats:  # documents of the first shares occur again in the last one
        pool = [*pool, pool[0], pool[25], pool[35]]
    config = file_data(written(tmp_path / "a.txt", pool))
    everything = load_corpora(config, PathsConfig())
    for needed in SUBSETS:
        some = load_corpora(config, PathsConfig(), needed)
        assert list(some) == [purpose for purpose in everything if purpose in needed]
        for purpose, corpus in some.items():
            assert corpus.documents == everything[purpose].documents, (purpose, needed)
            assert corpus.provenance == everything[purpose].provenance


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    """A source that is read here is one that is missed where it is missing."""
    sources = {purpose: tmp_path / f"{purpose}.txt" for purpose in SHARES}
    config = four(*(sources[purpose] for purpose in ("evaluation", "calibration", "tuning", "search")))
    for purpose in SHARES:
        written(sources[purpose], documents(10, name=purpose))
        (corpus,) = load_corpora(config, PathsConfig(), {purpose}).values()
        assert corpus.documents == documents(10, name=purpose)
        for other in set(SHARES) - {purpose}:
            with pytest.raises(DataError, match=rf"no data file .*{other}\.txt"):
                load_corpora(config, PathsConfig(), {purpose, other})
        sources[purpose].unlink()


def test_a_further_corpus_that_is_not_needed_keeps_its_share_and_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", documents(60))
    config = file_data(path)
    config.further = {"same": CorpusConfig("file", path=str(path))}
    everything = load_corpora(config, PathsConfig())
    config.further["other"] = CorpusConfig("file", path=str(tmp_path / "missing.txt"))
    some = load_corpora(config, PathsConfig(), set(SHARES))
    assert list(some) == list(SHARES)
    for purpose, corpus in some.items():
        assert corpus.documents == everything[purpose].documents


# ---- blocks and samples -------------------------------------------------------------------------------------------


def test_blocks_are_the_tokens_of_the_documents_joined_with_blank_lines(tiny: Tiny) -> None:
    lm, texts = tiny(), documents(6)
    corpus = Corpus("evaluation", texts, {"origin": "here"})
    independent = byte_tokenizer()("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    for length, count in ((16, 5), (7, 3), (32, None)):
        blocks = corpus.blocks(lm.encode, length, count)
        rows = len(independent) // length if count is None else count
        assert blocks.shape == (rows, length)
        assert blocks.flatten().tolist() == independent[: rows * length]
    whole = corpus.blocks(lm.encode, 16, 20)
    assert lm.decode(whole.flatten().tolist()) == "\n\n".join(texts)[:320]


def test_too_many_blocks_are_refused_with_how_many_there_are(tiny: Tiny) -> None:
    corpus = Corpus("evaluation", ["a" * 50], {"origin": "here"})
    assert corpus.blocks(tiny().encode, 10, 5).shape == (5, 10)
    with pytest.raises(DataError, match=r"data\.evaluation \(here\) fills 5 blocks of 10 tokens, but 6 were asked for"):
        corpus.blocks(tiny().encode, 10, 6)
    with pytest.raises(DataError, match=r"fills 0 blocks of 51 tokens, but 1 were asked for"):
        corpus.blocks(tiny().encode, 51, None)


def test_samples_are_exact_distinct_and_whole_windows_of_documents(tiny: Tiny) -> None:
    lm, texts = tiny(), documents(7, words=9)
    corpus = Corpus("tuning", texts, {"origin": "here"})
    windows = [text[start : start + 20] for text in texts for start in range(0, len(text) - 19, 20)]
    samples = corpus.samples(lm.encode, 20, len(windows), seed=0)
    assert samples.shape == (len(windows), 20)
    assert sorted(lm.decode(row.tolist()) for row in samples) == sorted(windows)
    starts = {lm.decode(row.tolist()) for row in samples[: len(texts)]}
    assert starts == {text[:20] for text in texts}, "every document gives its beginning before one gives more"


def test_samples_are_seeded(tiny: Tiny) -> None:
    lm = tiny()
    corpus = Corpus("tuning", documents(30), {"origin": "here"})
    first = corpus.samples(lm.encode, 20, 12, seed=3)
    assert torch.equal(first, Corpus("tuning", documents(30), {}).samples(lm.encode, 20, 12, seed=3))
    assert not torch.equal(first, corpus.samples(lm.encode, 20, 12, seed=4))
    assert torch.equal(first[:5], corpus.samples(lm.encode, 20, 5, seed=3)), "asking for fewer gives the first ones"


def test_too_many_samples_are_refused_with_how_many_there_are(tiny: Tiny) -> None:
    corpus = Corpus("search", ["a" * 50, "b" * 9], {"origin": "here"})
    assert corpus.samples(tiny().encode, 10, 5, seed=0).shape == (5, 10)
    with pytest.raises(DataError, match=r"data\.search \(here\) holds 5 texts of 10 tokens, but 6 were asked for"):
        corpus.samples(tiny().encode, 10, 6, seed=0)


def joined_from(texts: list[str], length: int, count: int) -> list[str]:
    """The last `count` samples where windows do not suffice: short documents in order, joined, and cut."""
    text = "\n\n".join(text for text in texts if len(text) < length)
    return [text[start : start + length] for start in range(0, len(text) - length + 1, length)][:count]


@pytest.mark.parametrize("length", [16, 20, 33])
@pytest.mark.parametrize("longs", [0, 1, 4])
def test_short_documents_are_joined_where_windows_of_long_ones_do_not_suffice(
    tiny: Tiny, length: int, longs: int
) -> None:
    lm, texts = tiny(), documents(14, words=2)
    for index in range(longs):  # among the short ones, so that joining has to leave them out
        texts.insert(3 * index + 1, f"long {index} " + "x" * 60)
    corpus = Corpus("tuning", texts, {"origin": "here"})
    windows = [text[start : start + length] for text in texts for start in range(0, len(text) - length + 1, length)]
    joined = joined_from(texts, length, 10**6)
    assert len(joined) >= 3
    for extra in (1, 2, len(joined)):
        samples = [lm.decode(row.tolist()) for row in corpus.samples(lm.encode, length, len(windows) + extra, seed=5)]
        assert sorted(samples[: len(windows)]) == sorted(windows)
        assert samples[len(windows) :] == joined[:extra]
    whole = len(windows) + len(joined)
    with pytest.raises(DataError, match=rf"holds {whole} texts of {length} tokens, but {whole + 1} were asked for"):
        corpus.samples(lm.encode, length, whole + 1, seed=5)


def test_joined_documents_do_not_depend_on_the_seed(tiny: Tiny) -> None:
    lm, corpus = tiny(), Corpus("search", documents(12, words=2), {"origin": "here"})
    first, second = (corpus.samples(lm.encode, 20, 4, seed=seed) for seed in (1, 2))
    assert torch.equal(first, second)


def test_token_counts_count_the_first_documents(tiny: Tiny) -> None:
    lm = tiny()
    counts = Corpus("search", ["aab", "abc", "zzz"], {}).token_counts(lm.encode, lm.vocabulary_size, documents=2)
    assert counts.shape == (lm.vocabulary_size,)
    assert {lm.decode([token]): int(counts[token]) for token in counts.nonzero().flatten().tolist()} == {
        "a": 3, "b": 2, "c": 1,
    }  # fmt: skip


# ---- the folder of paths.data_dir ---------------------------------------------------------------------------------

ARTICLE = [
    "",
    " = Title {} = \n",
    "",
    " Text {} goes on . \n",
    " = = Section = = \n",
    " = not a title \n",
    " More {} . \n",
    "",
]


def wikitext_rows(articles: int, start: int = 0) -> list[str]:
    return [row.replace("{}", str(index)) for index in range(start, start + articles) for row in ARTICLE]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The named sets as a folder, small."""
    root = tmp_path / "data"
    for name, rows in (("test", wikitext_rows(3)), ("train.head", wikitext_rows(40, start=100))):
        path = root / "wikitext2_raw" / f"{name}.rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n", encoding="utf-8")
    (root / "c4").mkdir()
    (root / "c4" / "c4.utf8").write_text("\n".join(documents(20, name="c")) + "\n", encoding="utf-8")
    return root


def wikitext2() -> DataConfig:
    train = CorpusConfig("wikitext2", "train")
    return DataConfig("wikitext2", CorpusConfig("wikitext2", "test"), train, train, CorpusConfig("c4", "train"))


def test_articles_of_wikitext_join_back_to_its_rows_exactly(data_dir: Path) -> None:
    corpora = load_corpora(wikitext2(), PathsConfig(data_dir=str(data_dir)))
    assert "\n\n".join(corpora["evaluation"].documents) == "\n\n".join(wikitext_rows(3))
    assert len(corpora["evaluation"].documents) == 3
    for index, document in enumerate(corpora["evaluation"].documents):
        assert f" = Title {index} = \n" in document
        assert " = = Section = = \n" in document


def test_the_train_split_is_shared_and_c4_has_one_document_a_line(data_dir: Path) -> None:
    corpora = load_corpora(wikitext2(), PathsConfig(data_dir=str(data_dir)))
    train = corpora["calibration"].documents + corpora["tuning"].documents
    assert "\n\n".join(train) == "\n\n".join(wikitext_rows(40, start=100))
    assert corpora["search"].documents == documents(20, name="c")
    assert [corpus.provenance["split"] for corpus in corpora.values()] == [
        "test",
        "train",
        "train",
        None,
    ]  # C4 in a folder has no splits


def test_a_missing_folder_or_file_of_it_is_named(data_dir: Path) -> None:
    with pytest.raises(DataError, match=r"paths\.data_dir='.*nowhere' is not a folder"):
        load_corpora(wikitext2(), PathsConfig(data_dir=str(data_dir / "nowhere")))
    (data_dir / "c4" / "c4.utf8").unlink()
    assert set(load_corpora(wikitext2(), PathsConfig(data_dir=str(data_dir)), {"evaluation", "tuning"})) == {
        "evaluation", "tuning",
    }  # fmt: skip
    with pytest.raises(DataError, match=r"no data file .*c4\.utf8"):
        load_corpora(wikitext2(), PathsConfig(data_dir=str(data_dir)))


# ---- files of the user's ------------------------------------------------------------------------------------------


def test_a_text_file_without_blank_lines_has_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(documents(20)) + "\n", encoding="utf-8")
    corpora = load_corpora(file_data(path), PathsConfig())
    assert [text for corpus in corpora.values() for text in corpus.documents] == documents(20)


def test_json_lines_are_read_by_field_and_keep_line_separators_inside_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"{text}\nsecond line\u2028third\n\nfourth" for text in documents(20)]
    lines = [json.dumps({"body": text, "other": 1}, ensure_ascii=False) for text in texts]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    data = DataConfig("file", *(CorpusConfig("file", path=str(path), text_field="body") for _ in range(4)))
    corpora = load_corpora(data, PathsConfig())
    assert [text for corpus in corpora.values() for text in corpus.documents] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a\.jsonl line 3 is not a JSON record"),
        ("[1, 2]", r"a\.jsonl line 3 is not a JSON record"),
        ('"only text"', r"a\.jsonl line 3 is not a JSON record"),
        ('{"txet": "a"}', r"a\.jsonl line 3 has no field 'text', only \['txet'\]"),
        ('{"text": 5}', r"a\.jsonl line 3: the field 'text' is no text but int"),
    ],
)
def test_a_damaged_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + '\n{"text": "b"}\n')
    with pytest.raises(DataError, match=message):
        load_corpora(file_data(path), PathsConfig())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, name: str) -> None:
    text = '{"text": "one"}' if name.endswith(".jsonl") else "one"
    data = codecs.BOM_UTF8 + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_documents(tmp_path / name, "text")) == ["one"]


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file .*nowhere\.txt"):
        load_corpora(file_data(tmp_path / "nowhere.txt"), PathsConfig())
    with pytest.raises(DataError, match=r"the folder .* holds no files"):
        load_corpora(file_data(tmp_path), PathsConfig())
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00abc")
    with pytest.raises(DataError, match=r"binary\.txt is not UTF-8 text"):
        load_corpora(file_data(tmp_path / "binary.txt"), PathsConfig())


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n\n")
    with pytest.raises(DataError, match=r"data\.evaluation .*no document left .*has 0 documents"):
        load_corpora(file_data(tmp_path / "empty.txt"), PathsConfig())


# ---- formats of files ---------------------------------------------------------------------------------------------

TEXTS = [*documents(6, 4), "NA", "12", "né \U0001f642", 'with "quotes", commas\nand a line']


def in_format(folder: Path, name: str) -> Path:
    """The texts in a file of this name."""
    import pyarrow
    from pyarrow import csv, parquet

    rows = [{"n": index, "text": text} for index, text in enumerate(TEXTS)]
    plain, path = name.lower().removesuffix(".gz"), folder / name
    packed = gzip.compress if name.lower().endswith(".gz") else bytes
    table = pyarrow.Table.from_pylist(rows)
    if plain.endswith(".parquet"):
        parquet.write_table(table, path)
        return path
    if plain.endswith((".csv", ".tsv")):
        buffer = io.BytesIO()
        csv.write_csv(table, buffer, csv.WriteOptions(delimiter="\t" if plain.endswith(".tsv") else ","))
        content = buffer.getvalue()
    elif plain.endswith(".txt"):
        content = "\n\n".join(TEXTS).encode()
    elif name.startswith("list"):
        content = json.dumps(rows).encode()
    elif name.startswith("strings"):
        content = json.dumps(TEXTS).encode()
    else:
        content = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(packed(content))
    return path


FORMATS = ["a.txt", "a.TXT.gz", "list.json", "strings.json.gz", "lines.json", "a.JSONL", "a.ndjson.gz"]
FORMATS += ["a[1].csv", "a.csv.gz", "a.TSV", "a*b.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(f"datasets.config.{place}", Path("/proc/none"))  # a home that is read-only
    path = in_format(tmp_path, name)
    assert list(read_documents(path, "text")) == TEXTS
    assert has_fields(path) == (not name.lower().startswith("a.txt"))


def test_a_folder_is_all_files_below_it(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "b" / ".hidden").mkdir(parents=True)
    (folder / "b" / ".hidden" / "x.bin").write_bytes(b"\0")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "b" / "1.txt").write_text("first\n\nsecond")
    (folder / "a.jsonl").write_text('{"text": "zeroth"}\n')
    assert list(read_documents(folder, "text")) == ["zeroth", "first", "second"]
    config = file_data(folder)
    inside = [folder / "a.jsonl", folder / "b" / "1.txt"]
    assert local_files(config, PathsConfig()) == inside, "their sizes and times name the run"
    (folder / "notes.docx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"notes\.docx is of no format that is read: .*\.parquet"):
        list(read_documents(folder, "text"))
    with pytest.raises(DataError, match=r"^data\.(evaluation\.)?path='.*corpus': .*notes\.docx is of no format"):
        load_corpora(config, PathsConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no files"):
        list(read_documents(tmp_path / "empty", "text"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"text", r"a\.bin is of no format that is read"),
        ("a", b"text", r"a is of no format that is read"),
        ("a.parquet.gz", b"", r"of no format"),
        ("a.parquet", b"PAR0", r"a\.parquet cannot be read as parquet: "),
        ("a.csv", b"text\n\xff\n", r"a\.csv cannot be read as csv: "),
        ("a.csv", b"", r"a\.csv cannot be read as csv: "),
        (
            "a.csv",
            b"words,n\na,1\n",
            r"a\.csv record 1 has no field 'text', only \['n', 'words'\]: name one .*text_field",
        ),
        ("a.txt.gz", b"text", r"a\.txt\.gz cannot be read: .*gzip"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a\.txt\.gz cannot be read: "),
        ("a.json", b'["a", ', r"a\.json is not a JSON list: "),
        ("a.json", b"[1]", r"a\.json record 1 is not a JSON record or text but int"),
        ("a.json", b'{"text": ["a"]}', r"a\.json line 1: the field 'text' is no text but list"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not a JSON record: "),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl line 1 is not a JSON record: "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}', r"a\.jsonl line 2 holds half of a surrogate .*'\\ud83d'"),
        ("a.json", b'[{"x": {"\\udc00": 1}}]', r"a\.json holds half of a surrogate pair"),
        ("a.json", b'[{"messages": [{"role": "user"}]}]', r"record 1, message 1 has \['role'\], and a message has"),
        ("a.json", b'[{"messages": []}]', r"'messages' is a chat, and there is no tokenizer"),
    ],
)
def test_what_is_not_text_is_refused_by_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(path, "text"))
    str(caught.value).encode()


def test_a_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude42"}')
    assert list(read_documents(path, "text")) == ["\U0001f642"]


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def test_chats_are_written_by_the_tokenizers_template(tmp_path: Path, tiny: Tiny) -> None:
    lm = tiny()
    chats = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(3)]
    shared = [[{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a{n}"}] for n in range(3)]
    (tmp_path / "own.json").write_text(json.dumps([{"messages": chat, "id": 1} for chat in chats]))
    (tmp_path / "gpt.jsonl").write_text("\n".join(json.dumps({"conversations": chat}) for chat in shared))
    (tmp_path / "named.jsonl").write_text("\n".join(json.dumps({"text": "no", "mine": chat}) for chat in chats))
    Dataset.from_list([{"messages": chat} for chat in chats]).to_parquet(tmp_path / "a.parquet")
    before = lm.tokenizer.chat_template
    try:
        lm.tokenizer.chat_template = None
        with pytest.raises(DataError, match=r"own\.json record 1: .*has no chat template: .*text_field"):
            list(read_documents(tmp_path / "own.json", "text", lambda messages: chat_text(lm, messages)))
        lm.tokenizer.chat_template = TEMPLATE
        for name, field in [
            ("own.json", "text"),
            ("gpt.jsonl", "text"),
            ("named.jsonl", "mine"),
            ("a.parquet", "text"),
        ]:
            found = list(read_documents(tmp_path / name, field, lambda messages: chat_text(lm, messages)))
            assert found == [f"<s>[user] q{n}\n[assistant] a{n}\n" for n in range(3)], name
        with pytest.MonkeyPatch.context() as patch:  # a tokenizer that puts BOS in front by itself
            patch.setattr(LanguageModel, "adds_bos", True)
            assert chat_text(lm, chats[0]) == "[user] q0\n[assistant] a0\n", "the key `bos` says whether it is there"
        lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"line 1: the chat template of tiny_\w+ does not take .*must alternate"):
            list(read_documents(tmp_path / "gpt.jsonl", "text", lambda messages: chat_text(lm, messages)))
    finally:
        lm.tokenizer.chat_template = before
