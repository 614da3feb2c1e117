"""A report's numbers are those of a count by hand and of the libraries' own tokenizers."""

import io
import json
import logging
import re
import unicodedata
from dataclasses import asdict

import pytest
import sentencepiece
from open_clip import SimpleTokenizer
from open_clip.tokenizer import basic_clean, whitespace_clean
from PIL import Image
from tokenizers import Tokenizer as RustTokenizer, decoders, models, normalizers, pre_tokenizers

from vlm.cli.main import VERBS, main
from vlm.errors import TokenizerError, VlmError
from vlm.text.config import TokenizerConfig
from vlm.text.fast_vocabulary import FastVocabulary
from vlm.text.measuring import SplitWord, compare, measure
from vlm.text.report import format_report, plot_report
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer

PIECES = ("[unk]", "[pad]", "[b]", "[e]", "a", ",", "cat", "the", "sit", "##s")
COUNTED = ("a cat", "cats, cats", "The  CAT sits", "a dog")
"""Their pieces are 2, 5, 4 and 2, the last one unknown; their words 2, 2, 3 and 2."""

CAPTIONS = {
    "zh": (
        "在警车前，一条训练有素的警犬坐在主人身旁。",
        "两个小孩子在草地上踢足球……",
        "“你好”！一个男人穿着蓝色的Ｔ恤！！",
        "厨师㊗大家新年快乐 👍🏽",
    ),
    "en": (
        "A DJ with one hand on his headphones & one hand on his turntable.",
        "Two police officers aren't standing in front of the white canopy!!",
        "Café colecting ½ of the earmuffs",
    ),
}


def word_pieces(context_length: int = 6) -> Tokenizer:
    """Make a tokenizer small enough to count by hand."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    rust = RustTokenizer(models.WordPiece(vocabulary, unk_token="[unk]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    config = TokenizerConfig(
        context_length=context_length, begin_of_text="[b]", end_of_text="[e]", padding="[pad]"
    )
    return Tokenizer(FastVocabulary(rust.to_str().encode()), config)


def merges_of_letters(letters: str) -> Tokenizer:
    """Make a byte-pair tokenizer that leaves out what it does not know, without a word."""
    pieces = ["<e>", *letters]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, [])
    vocabulary = FastVocabulary(RustTokenizer(model).to_str().encode())
    config = TokenizerConfig(context_length=8, begin_of_text=None, end_of_text="<e>", padding="<e>")
    return Tokenizer(vocabulary, config)


def train_pieces(texts: list[str], **options: object) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf", pad_id=0, unk_id=1, bos_id=2, eos_id=3,
        minloglevel=2, **options,
    )  # fmt: skip
    config = TokenizerConfig(
        context_length=24, begin_of_text="<s>", end_of_text="</s>", padding="<pad>"
    )
    return Tokenizer(SentencePieceVocabulary(model.getvalue()), config)


@pytest.fixture(scope="module")
def unigram():
    """Return a unigram tokenizer with byte fallback, whose space is a piece of its own."""
    texts = ["一个男人穿着蓝色的衣服", "两个小孩子在草地上", "a man on the grass... 1 2"] * 3
    return train_pieces(texts, vocab_size=330, byte_fallback=True, user_defined_symbols=["▁"])


def width(text: str) -> int:
    """Count the columns of a terminal by Unicode's annex 11."""
    return sum(2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text)


def without_time(statistics) -> dict[str, object]:
    return {key: v for key, v in asdict(statistics).items() if "second" not in key}


def test_the_numbers_are_those_counted_by_hand():
    statistics = measure(word_pieces(), COUNTED)
    assert without_time(statistics) == {
        "texts": 4,
        "characters": 4 + 9 + 10 + 4,
        "words": 2 + 2 + 3 + 2,
        "tokens_per_text": (4 + 7 + 6 + 4) / 4,
        "tokens_per_character": 13 / 27,
        "tokens_per_word": 13 / 9,
        "tokens_p50": 4,
        "tokens_p99": 7,
        "tokens_max": 7,
        "truncated": 1,
        "truncated_share": 1 / 4,
        # Of single characters only `a` and the comma are pieces.
        "unknown_share": 1 - (2 + 3 + 1 + 1) / 27,
        "round_trip_share": 3 / 4,
        "most_split_words": (
            {"word": "cats", "pieces": 2, "occurrences": 2},
            {"word": "sits", "pieces": 2, "occurrences": 1},
        ),
    }


def test_the_speed_is_the_number_of_texts_by_the_time():
    statistics = measure(word_pieces(), COUNTED)
    assert statistics.seconds > 0
    assert statistics.texts_per_second == pytest.approx(4 / statistics.seconds)


@pytest.mark.parametrize("language", CAPTIONS)
def test_the_numbers_of_clip_are_those_of_open_clips_tokenizer(clip, language):
    simple, texts = SimpleTokenizer(), CAPTIONS[language]
    lengths = [len(simple.encode(text)) + 2 for text in texts]
    characters = [
        character
        for text in texts
        for character in whitespace_clean(basic_clean(text)).lower()
        if character != " "
    ]
    unknown = [character for character in characters if len(simple.encode(character)) > 1]
    statistics = measure(clip, texts)
    assert statistics.tokens_per_text == pytest.approx(sum(lengths) / len(texts))
    assert statistics.tokens_max == max(lengths)
    assert statistics.truncated == sum(length > 77 for length in lengths)
    assert statistics.unknown_share == pytest.approx(len(unknown) / len(characters))
    assert statistics.most_split_words
    for split in statistics.most_split_words:
        assert split.pieces == len(simple.encode(split.word)) > 1


def test_the_numbers_of_a_unigram_model_are_sentencepieces_own(unigram):
    texts = CAPTIONS["zh"]
    processor = unigram.vocabulary._processor
    lengths = [len(processor.encode(text)) + 2 for text in texts]
    characters = [character for text in texts for character in text if character != " "]
    in_bytes = [sum(map(processor.is_byte, processor.encode(c))) > 1 for c in characters]
    statistics = measure(unigram, texts)
    assert statistics.tokens_per_text == pytest.approx(sum(lengths) / len(texts))
    assert statistics.truncated == sum(length > 24 for length in lengths) > 0
    assert statistics.unknown_share == pytest.approx(sum(in_bytes) / len(characters))
    assert 0 < statistics.unknown_share < 1


@pytest.mark.parametrize(
    ("character", "unknown"),
    [("人", False), ("鑫", True), ("…", False), ("½", True), ("１", False), ("\u200b", False)],
    ids=["a piece", "bytes", "three pieces by NFKC", "bytes among them", "by NFKC", "nothing"],
)
def test_a_character_is_unknown_if_it_is_not_pieces_of_what_it_is_written_as(
    unigram, character, unknown
):
    share = measure(unigram, ["人人人" + character]).unknown_share
    assert share == (0.25 if unknown else 0.0)


def test_a_space_sign_is_no_piece_of_a_word(unigram):
    assert unigram.vocabulary.pieces()[unigram.split(["男人"])[0][0]] == "▁"
    assert measure(unigram, ["鑫"] * 3).most_split_words == (
        SplitWord(word="鑫", pieces=3, occurrences=3),
    )


def test_a_character_that_becomes_the_unknown_piece_or_nothing_is_unknown():
    strict = train_pieces(["一个男人", "a man"] * 3, vocab_size=40)
    assert strict.special_ids.unknown is not None
    assert measure(strict, ["男人鑫"]).unknown_share == pytest.approx(1 / 3)
    assert measure(merges_of_letters("人男"), ["男人鑫"]).unknown_share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "comes_back"),
    [
        ("A  DOG\tand\u3000a cat ", True),
        ("ＤＯＧ，", True),
        ("STRASSE straße", True),
        ("a!♥ wow!", True),  # the piece `!` is CLIP's padding
        ("一只𠮷", True),
        ("a &amp; b", False),
    ],
    ids=["case and space", "width", "folded letters", "padding", "bytes", "an entity"],
)
def test_a_round_trip_forgives_case_width_and_space_only(clip, text, comes_back):
    assert measure(clip, [text, "a"]).round_trip_share == (1.0 if comes_back else 0.5)


def test_the_words_that_cost_most_come_first_and_are_ten():
    often_or_long = {"cats": 1, "sits": 9, "theaa": 1} | {"a" + "s" * n: 1 for n in range(2, 12)}
    texts = [word for word, count in often_or_long.items() for _ in range(count)]
    listed = measure(word_pieces(), texts).most_split_words
    longest = [SplitWord(word="a" + "s" * n, pieces=n + 1, occurrences=1) for n in range(11, 2, -1)]
    sits = SplitWord(word="sits", pieces=2, occurrences=9)
    # Both cost 9 pieces more than words need; the alphabet decides.
    assert list(listed) == [*longest[:3], sits, *longest[3:]]


def test_texts_of_several_batches_are_all_counted():
    once, often = measure(word_pieces(), COUNTED), measure(word_pieces(), COUNTED * 600)
    assert often.texts == 2400
    assert often.truncated == 600
    for name in ("tokens_per_text", "tokens_per_word", "unknown_share", "round_trip_share"):
        assert getattr(often, name) == pytest.approx(getattr(once, name))


def test_the_tokenizer_and_the_log_do_not_notice(caplog):
    tokenizer = word_pieces()
    with caplog.at_level(logging.INFO):
        measure(tokenizer, COUNTED)
        assert tokenizer.truncated_share == 0.0
        assert not caplog.records
        tokenizer.encode(COUNTED)
    assert tokenizer.truncated_share == 0.25
    assert len(caplog.records) == 1


@pytest.mark.parametrize("texts", [[], ["", " "], ["…"]], ids=["none", "empty", "no words"])
def test_texts_without_words_are_refused_with_their_language(texts):
    with pytest.raises(TokenizerError, match="no texts with words; expected captions"):
        measure(word_pieces(), texts)
    with pytest.raises(TokenizerError, match="no texts with words in 'zh'"):
        compare({"tiny": word_pieces()}, {"en": COUNTED, "zh": texts})


def test_nothing_to_compare_is_refused():
    for tokenizers, texts in (({}, {"en": COUNTED}), ({"tiny": word_pieces()}, {})):
        with pytest.raises(TokenizerError, match="nothing to compare"):
            compare(tokenizers, texts)


def test_half_a_character_is_refused():
    with pytest.raises(TokenizerError, match="not strings of valid Unicode"):
        measure(word_pieces(), ["a \ud800"])


def test_a_comparison_has_the_measures_of_every_tokenizer_in_every_language(clip):
    tokenizers = {"tiny": word_pieces(), "clip": clip}
    report = compare(tokenizers, CAPTIONS)
    assert list(report.statistics) == ["zh", "en"]
    assert list(report.tokenizers) == ["tiny", "clip"]
    assert report.tokenizers["clip"].fingerprint == clip.fingerprint
    for language, texts in CAPTIONS.items():
        for name, tokenizer in tokenizers.items():
            there = report.statistics[language][name]
            assert without_time(there) == without_time(measure(tokenizer, texts))


def test_a_record_is_what_json_gives_back():
    report = compare({"tiny": word_pieces()}, {"en": COUNTED})
    record = report.as_record()
    assert json.loads(json.dumps(record)) == record
    assert record["tokenizers"]["tiny"]["vocab_size"] == len(PIECES)
    assert record["tokenizers"]["tiny"]["context_length"] == 6
    of_english = record["languages"]["en"]["tiny"]
    assert of_english["truncated"] == 1
    assert of_english["most_split_words"][0] == {"word": "cats", "pieces": 2, "occurrences": 2}


def test_a_table_has_a_row_a_tokenizer_and_lines_up(clip):
    report = compare({"很小": word_pieces(), "clip": clip}, {"en": COUNTED, "zh": CAPTIONS["zh"]})
    blocks = format_report(report).split("\n## ")
    assert len(blocks) == 2
    for block in blocks:
        table = [line for line in block.splitlines() if line.startswith("|")]
        assert len(table) == 4
        assert len({width(line) for line in table}) == 1
        assert all(re.fullmatch(r"\|( [^|]+ \|){12}", line) for line in table)
    rows = [re.findall(r"[^|]+", line) for line in blocks[0].splitlines() if line[:1] == "|"]
    cells, other = ([cell.strip() for cell in row] for row in rows[2:])
    assert cells[:5] == ["很小", "10", "6", "5.25", "1.000"]
    assert cells[5:-1] == [
        "0.481", "1.444", "4 / 7 / 7", "1 (25.00 %)", "74.07 %", "75.00 %",
    ]  # fmt: skip
    assert float(other[4]) == pytest.approx(float(other[3]) / 5.25, abs=1e-3)
    assert "* 很小: cats 2 x 2, sits 2 x 1" in blocks[0]


@pytest.mark.slow
@pytest.mark.parametrize("languages", [("zh", "en"), ("en",)], ids=["two languages", "one"])
def test_a_plot_is_an_image_whatever_the_names_are(tmp_path, languages):
    tokenizers = {name: word_pieces() for name in ("很小", "_old", "$x$ $y")}
    report = compare(tokenizers, dict.fromkeys(languages, CAPTIONS["en"]))
    plot_report(report, tmp_path / "new" / "plot.png")
    plot_report(report, tmp_path / "plot.svg")
    with Image.open(tmp_path / "new" / "plot.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 400
        assert len(image.convert("RGB").getcolors(1 << 20)) > 3
    svg = (tmp_path / "plot.svg").read_text()
    # matplotlib writes what its letters spell as comments.
    for name in (r"\u5f88\u5c0f", "_old", "$x$ $y", "en, per word"):
        assert f"<!-- {name} -->" in svg


def test_a_plot_of_another_kind_or_in_a_bad_place_is_refused(tmp_path):
    report = compare({"tiny": word_pieces()}, {"en": COUNTED})
    with pytest.raises(TokenizerError, match=r"plot\.doc; expected \.png or \.svg"):
        plot_report(report, tmp_path / "plot.doc")
    (tmp_path / "file").touch()
    with pytest.raises(VlmError, match="cannot write"):
        plot_report(report, tmp_path / "file" / "plot.png")


@pytest.fixture
def vlm_report(monkeypatch, capsys):
    """Return what runs `vlm tokenizer report` and gives its exit code and what it printed."""
    verb = ("vlm.cli.tokenizer_report", "compare tokenizers on captions")
    monkeypatch.setitem(VERBS, ("tokenizer", "report"), verb)

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["tokenizer", "report", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Stand in a folder with two tokenizers, a bundle, and captions in both languages."""
    for folder in ("a/tiny", "b/tiny", "bundle/tokenizer"):
        word_pieces().save(tmp_path / folder)
    (tmp_path / "bundle" / "vlm.json").write_text("{}")
    for language, texts in CAPTIONS.items():
        (tmp_path / f"{language}.txt").write_text("\n".join(texts) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_a_table_of_folders_and_bundles(files, vlm_report):
    code, out, err = vlm_report(
        "a/tiny", "bundle/", "--zh", "zh.txt", "--en", "en.txt", "--plot", "plot.svg"
    )
    assert (code, err) == (0, "")
    assert [line[:5] for line in out.splitlines() if line.startswith("##")] == ["## zh", "## en"]
    rows = [line.split()[1] for line in out.splitlines() if line.startswith("| ")]
    assert rows == ["tokenizer", "---------", "tiny", "bundle"] * 2
    assert (files / "plot.svg").is_file()


def test_the_command_prints_json_of_what_it_read(files, vlm_report):
    code, out, _ = vlm_report("bundle", "--en", "en.txt", "en.txt", "--limit", "5", "--json")
    record = json.loads(out)
    texts = [*CAPTIONS["en"], *CAPTIONS["en"]][:5]
    assert code == 0
    assert list(record["languages"]) == ["en"]
    there = record["languages"]["en"]["bundle"]
    expected = compare({"bundle": word_pieces()}, {"en": texts}).as_record()
    assert there | {"seconds": 0, "texts_per_second": 0} == (
        expected["languages"]["en"]["bundle"] | {"seconds": 0, "texts_per_second": 0}
    )
    assert record["tokenizers"] == expected["tokenizers"]


def test_the_command_reads_everything_without_a_limit(files, vlm_report):
    _, out, _ = vlm_report("bundle", "--zh", *["zh.txt"] * 3, "--limit", "0", "--json")
    assert json.loads(out)["languages"]["zh"]["bundle"]["texts"] == 3 * len(CAPTIONS["zh"])


def test_folders_of_one_name_are_told_apart_by_their_parents(files, vlm_report):
    _, out, _ = vlm_report("a/tiny", "bundle", "b/../b/tiny/", "--en", "en.txt", "--json")
    assert list(json.loads(out)["tokenizers"]) == ["a/tiny", "bundle", "b/tiny"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bundle"], "give texts by --zh and --en"),
        (["bundle", "--en", "en.txt", "--limit", "-1"], "limit is -1; expected"),
        (["bundle", "--en", "en.txt", "--plot", "x.doc"], "cannot draw x.doc"),
        (["bundle", "bundle/", "--en", "en.txt"], "bundle is given 2 times"),
        (["b", "--en", "en.txt"], "b holds no tokenizer"),
        (["bundle", "--en", "gone.txt"], "gone.txt: nothing is there"),
    ],
    ids=["no texts", "limit", "plot", "twice", "no tokenizer", "no file"],
)
def test_what_the_command_cannot_do_is_one_line(files, vlm_report, words, said):
    code, out, err = vlm_report(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
