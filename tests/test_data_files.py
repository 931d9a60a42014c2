"""Text, token files and the prepare command, with everything that can be wrong with a file."""

import json
import re

import numpy as np
import pytest

from effattn_jax.data import DataConfig, load
from effattn_jax.data.codecs import Bytes, Characters, Symbols, Tokenizer, from_spec
from effattn_jax.data.prepare import atomic, main, pieces, prepare, split_pieces
from effattn_jax.data.text import python_topics, text_files
from effattn_jax.data.tokens import load_tokens

TEXT = "".join(f"Line {i}: café 春 \U0001f600\n" for i in range(120))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("level", ["bytes", "characters"])
def test_text_is_split_at_nine_tenths_and_read_whole(file, level):
    dataset = load(DataConfig(path=str(file), level=level, context=16, batch_size=4))
    cut = int(len(TEXT) * 0.9)
    assert dataset.decode(dataset.training) == TEXT[:cut] and dataset.decode(dataset.validation) == TEXT[cut:]
    held = TEXT[cut:]
    assert dataset.bytes_per_token == (1 if level == "bytes" else len(held.encode()) / len(held))
    assert dataset.vocab_size == (256 if level == "bytes" else len(set(TEXT)))


def test_batches_are_crops_and_targets_the_next_tokens(file):
    dataset = load(DataConfig(path=str(file), level="characters", context=16, batch_size=64))
    batch = dataset.batch(0, 0)
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1]) and batch["weights"].all()
    training = dataset.decode(dataset.training)
    for row, target in zip(batch["tokens"], batch["targets"]):
        assert dataset.decode(np.append(row, target[-1])) in training


def test_crops_start_anywhere_uniformly(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 40))))
    dataset = load(
        DataConfig(path=str(path), level="characters", context=16, batch_size=4000, validation_fraction=0.45)
    )
    starts = np.bincount(dataset.batch(0, 0)["tokens"][:, 0], minlength=6)  # 22 training tokens: starts 0..5
    assert len(starts) == 6 and np.abs(starts / 4000 - 1 / 6).max() < 0.03


def test_validation_windows_make_each_token_a_target_once(file):
    dataset = load(DataConfig(path=str(file), level="characters", context=16, batch_size=4))
    batches = list(dataset.validation_batches())
    targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    inputs = np.concatenate([batch["tokens"][batch["weights"] > 0] for batch in batches])
    assert np.array_equal(targets, dataset.validation[1:]) and np.array_equal(inputs, dataset.validation[:-1])
    few = list(dataset.validation_batches(2))
    assert len(few) == 2 and all(batch["weights"].any(axis=1).all() for batch in few)
    assert np.array_equal(few[0]["tokens"][0], dataset.validation[:16])


def test_default_text_shares_no_paragraph_between_the_parts():
    training, validation = python_topics(0.1)
    assert 300_000 < len(training) + len(validation) and len(set(training + validation)) < 256
    parts = [{" ".join(p.split()) for p in re.split(r"\n\s*\n", part) if p.strip()} for part in (training, validation)]
    assert parts[0] and parts[1] and not parts[0] & parts[1]
    shared = {validation[i : i + 150] for i in range(len(validation) - 150)}
    assert not any(training[i : i + 150] in shared for i in range(len(training) - 150))


def test_folder_rules(tmp_path):
    for name, text in (("b.txt", "bb"), ("a/z.md", "az"), ("a.txt", "a"), (".hidden.txt", "no"), ("x.bin", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text * 20)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    dataset = load(DataConfig(path=str(tmp_path), context=4))
    whole = dataset.decode(np.concatenate([dataset.training, dataset.validation]))
    assert whole == "a" * 20 + "\n" + "az" * 20 + "\n" + "bb" * 20


@pytest.mark.parametrize("name", ["missing.txt", "x\0y", "n" * 5000])
def test_missing_path(tmp_path, name):
    with pytest.raises(ValueError, match="data.path: .* given, must be an existing file or folder"):
        load(DataConfig(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    "content, level, words",
    [
        (b"", "bytes", "must hold text, and is empty"),
        (b" \n\n", "bytes", "must hold text, and is empty"),
        (b"good \xff bad", "bytes", "must be UTF-8 text, and byte 5 is not"),
        (b"good \xff bad", "characters", "must be UTF-8 text, and byte 5 is not"),
        (b"short", "bytes", "data.context: 64 given, must be less than the 4 tokens of the training part"),
        (b"x" * 200, "characters", "must be less than the 20 tokens of the validation part"),
    ],
)
def test_bad_text(tmp_path, content, level, words):
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load(DataConfig(path=str(path), level=level))
    assert "\n" not in str(error.value)


def test_folder_without_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="must hold at least one text file"):
        load(DataConfig(path=str(tmp_path)))


def test_fingerprint_follows_contents_not_names(tmp_path):
    def fingerprint(name, text, **fields):
        (tmp_path / name).write_text(text)
        return load(DataConfig(path=str(tmp_path / name), context=8, **fields)).fingerprint

    one = fingerprint("a.txt", TEXT)
    assert one == fingerprint("b.txt", TEXT) != fingerprint("c.txt", TEXT.replace("7", "8"))
    assert one != fingerprint("a.txt", TEXT, level="characters") != fingerprint("a.txt", TEXT, validation_fraction=0.2)
    assert one != fingerprint("a.txt", TEXT, validation_fraction=0.2)


@pytest.mark.parametrize("codec", [Bytes(), Characters(TEXT), Symbols(["_", "Line"])])
def test_codecs_come_back_from_their_json(codec):
    again = from_spec(json.loads(json.dumps(codec.spec())))
    assert again.vocab_size == codec.vocab_size
    ids = again.encode("Line")
    assert ids.dtype == np.int32 and codec.decode(ids) == "Line" == again.decode(ids)
    assert codec.decode(codec.encode("")) == ""


def test_codec_errors():
    with pytest.raises(ValueError, match="text: 'xyz' given, must be among the 2 characters"):
        Characters("abab").encode("xayyz")
    with pytest.raises(ValueError, match="text: '7' given, must be among the symbols _ a"):
        Symbols(["_", "a"]).encode("a 7")
    with pytest.raises(ValueError, match=r"text: '\\udcff' given, must be characters that UTF-8 has"):
        Bytes().encode("a\udcff")
    with pytest.raises(ValueError, match="codec: 'bpe' given, must be one of bytes"):
        from_spec({"codec": "bpe"})


# --- token files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_prepare_round_trip(file, tmp_path, tokenizer, with_tokenizer):
    meta = prepare(str(file), str(tmp_path / "new" / "out"), tokenizer=str(tokenizer) if with_tokenizer else None)
    dataset = load(DataConfig(task="tokens", path=str(tmp_path / "new" / "out.bin"), context=16, batch_size=4))
    training, validation = dataset.decode(dataset.training), dataset.decode(dataset.validation)
    assert training + validation == TEXT and training.endswith("\n")
    assert 0.05 < len(validation) / len(TEXT) <= 0.1
    assert dataset.bytes_per_token == len(validation.encode()) / len(dataset.validation)
    assert dataset.vocab_size == meta["vocab_size"] == (300 if with_tokenizer else 256)
    assert dataset.training.dtype == (np.uint16 if with_tokenizer else np.uint8)
    names = {"out.bin", "out.json"} | ({"out.tokenizer.json"} if with_tokenizer else set())
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    if with_tokenizer:
        assert from_spec(dataset.codec.spec()).decode(dataset.training) == training


def test_a_tokenizer_that_truncates_and_pads_loses_and_adds_nothing(file, tmp_path, tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    whole = prepare(str(file), str(tmp_path / "whole"), tokenizer=str(tokenizer))
    cutting = tokenizers.Tokenizer.from_file(str(tokenizer))
    for limits in ({"max_length": 8, "pad": 1}, {"max_length": 10**6, "pad": 10**6}):
        cutting.enable_truncation(limits["max_length"])
        cutting.enable_padding(length=limits["pad"])
        cutting.save(str(tmp_path / "cutting.json"))
        given = {"tokenizer": str(tmp_path / "cutting.json"), "overwrite": True}
        assert prepare(str(file), str(tmp_path / "out"), **given)["sha256"] == whole["sha256"]
    dataset = load(DataConfig(task="tokens", path=str(tmp_path / "out"), context=16))
    assert len(dataset.codec.encode(TEXT)) == whole["tokens"]


def test_bytes_of_any_file(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 4)
    prepare(str(tmp_path / "raw"), str(tmp_path / "out"))
    dataset = load(DataConfig(task="tokens", path=str(tmp_path / "out"), context=16))
    assert np.concatenate([dataset.training, dataset.validation]).tobytes() == bytes(range(256)) * 4


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_pieces_are_the_whole_and_cut_no_character(tmp_path, size):
    (tmp_path / "a").write_text(TEXT)
    (tmp_path / "b").write_text("春" * 50)
    found = list(pieces([tmp_path / "a", tmp_path / "b"], size))
    assert b"".join(found).decode() == TEXT + "\n" + "春" * 50
    assert [piece.decode() for piece in found]


@pytest.mark.parametrize("text", [TEXT, "春" * 400, "a" * 999])
@pytest.mark.parametrize("size", [5, 100, 100_000])
def test_boundary_is_near_its_place(tmp_path, text, size):
    (tmp_path / "a").write_text(text)
    total = len(text.encode())
    found = list(split_pieces(pieces([tmp_path / "a"], size), int(0.9 * total)))
    training, validation = (b"".join(p for p, held in found if held is side) for side in (False, True))
    assert (training + validation).decode() == text and training.decode() and validation.decode()
    assert 0 <= len(training) - int(0.9 * total) < 40


def test_token_file_cut_short_or_foreign(file, tmp_path):
    prepare(str(file), str(tmp_path / "out"))
    config = DataConfig(task="tokens", path=str(tmp_path / "out"), context=16)
    whole = (tmp_path / "out.bin").read_bytes()
    (tmp_path / "out.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"has {len(whole) - 1} bytes, must have {len(whole)}"):
        load(config)
    (tmp_path / "out.bin").unlink()
    with pytest.raises(ValueError, match="is missing, must have"):
        load(config)
    (tmp_path / "out.bin").write_bytes(whole)
    meta = json.loads((tmp_path / "out.json").read_text())
    for change, words in (
        ({"format": "other"}, "must be a meta file of format"),
        ({"tokens": "many"}, "must have a field tokens of type int"),
        ({"dtype": "int8"}, "must have a dtype among"),
        ({"training_tokens": 10**9}, "consistent counts"),
        ({"tokenizer": "gone.json"}, "must be the tokenizer that prepare put beside"),
    ):
        (tmp_path / "out.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=words):
            load(config)
    (tmp_path / "out.json").write_text("{")
    with pytest.raises(ValueError, match="must be readable JSON"):
        load(config)
    (tmp_path / "out.json").unlink()
    with pytest.raises(ValueError, match="must be made by `python -m effattn_jax.data.prepare`"):
        load(config)


def test_token_rows_are_read_in_place(file, tmp_path):
    prepare(str(file), str(tmp_path / "out"))
    dataset = load_tokens(DataConfig(task="tokens", path=str(tmp_path / "out"), context=16))
    assert isinstance(dataset.training, np.memmap) and not dataset.training.flags.writeable


@pytest.mark.parametrize(
    "content, options, words",
    [
        (b"", {}, "must hold text, and is empty"),
        (b"ab\ncd \xff", {"tokenizer": True}, "must be UTF-8 text, and byte 6 is not"),
        (b"abc", {"tokenizer": "nowhere.json"}, "tokenizer: 'nowhere.json' given, must be a readable"),
        (b"abc", {"validation_fraction": 0.0}, "data.validation_fraction: 0.0 given"),
    ],
)
def test_prepare_refuses(tmp_path, tokenizer, content, options, words):
    (tmp_path / "in.txt").write_bytes(content)
    options = {name: str(tokenizer) if value is True else value for name, value in options.items()}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=words):
        prepare(str(tmp_path / "in.txt"), str(tmp_path / "out"), **options)
    assert sorted(tmp_path.iterdir()) == before


def test_prepare_keeps_what_exists(file, tmp_path):
    first = prepare(str(file), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="exists already: choose another or pass --overwrite"):
        prepare(str(file), str(tmp_path / "out"))
    file.write_text(TEXT * 2)
    assert prepare(str(file), str(tmp_path / "out"), overwrite=True)["tokens"] == 2 * first["tokens"]


def test_prepare_keeps_a_tokenizer_that_exists(file, tmp_path, tokenizer):
    (tmp_path / "out.tokenizer.json").write_text("a person's own")
    with pytest.raises(ValueError, match="out.tokenizer.json exists already: choose another or pass --overwrite"):
        prepare(str(file), str(tmp_path / "out"), tokenizer=str(tokenizer))
    assert (tmp_path / "out.tokenizer.json").read_text() == "a person's own"
    assert not (tmp_path / "out.bin").exists()
    prepare(str(file), str(tmp_path / "out"))  # of bytes, which needs no such file
    assert (tmp_path / "out.tokenizer.json").read_text() == "a person's own"


@pytest.mark.parametrize("output", ["", ".", "..", "/", "folder/.."])
def test_output_without_a_name(file, output):
    with pytest.raises(ValueError, match=f"output: {output!r} given, must end in the name of a file"):
        prepare(str(file), output)
    with pytest.raises(ValueError, match="data.path: '/' given, must end in the name of a file"):
        load(DataConfig(task="tokens", path="/"))


@pytest.mark.parametrize("output", ["out", "sub/../out"])
def test_prepare_into_the_folder_it_reads(file, tmp_path, tokenizer, output):
    tokenizer = tokenizer.rename(tmp_path / ".tokenizer.json")
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.json").write_text('"text of a person"')
    options = {"tokenizer": str(tokenizer), "overwrite": True}
    first = prepare(str(tmp_path), str(tmp_path / output), **options)
    assert prepare(str(tmp_path), str(tmp_path / output), **options) == first
    assert prepare(str(tmp_path), str(tmp_path / "other"), **options)["sha256"] == first["sha256"]
    assert [path.name for path in text_files(str(tmp_path))] == ["notes.json", "text.txt"]
    (tmp_path / "out.bin").unlink()
    assert prepare(str(tmp_path), str(tmp_path / output), **options) == first
    with pytest.raises(ValueError, match="must hold text besides the files of the output"):
        prepare(str(tmp_path / "out.json"), str(tmp_path / output), **options)


def test_interrupted_writing_leaves_nothing(tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(OSError, match="full"), atomic(tmp_path / "kept") as stream:
        stream.write(b"half")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "old"


def test_command(file, tmp_path, capsys):
    pytest.importorskip("tyro")
    main([str(file), str(tmp_path / "out")])
    assert f"{len(TEXT.encode()):,} tokens of uint8, vocabulary 256" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([str(file), str(tmp_path / "out")])
    assert str(stop.value.code).startswith("error: output:") and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a.txt"], "error: Missing from python -m effattn_jax.data.prepare: STR OUTPUT, where to write: "),
        (["a.txt", "b", "--tokeniser", "c"], "error: Unrecognized options: --tokeniser, c"),
        (["a.txt", "b", "--validation-fraction", "x"], "error: Error parsing --validation-fraction: could not convert"),
    ],
)
def test_mistakes_in_the_arguments_are_one_line(capsys, arguments, line):
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code.startswith(line) and "\n" not in stop.value.code and "--- " not in stop.value.code
    assert capsys.readouterr() == ("", "")


def test_help_of_the_command(capsys):
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code and "Turn a text file or folder into a token file" in capsys.readouterr().out


def test_broken_tokenizer_file():
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="tokenizer: not a Hugging Face tokenizers file"):
        Tokenizer("{}")


def test_a_tokenizer_of_text_that_is_no_text(tokenizer):
    with pytest.raises(ValueError, match=r"text: '\\udcff' given, must be characters that UTF-8 has"):
        Tokenizer(tokenizer.read_text()).encode("a\udcff")
