"""`tokenlab generate` on a tiny trained run: what is printed where, prompts of every kind, what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab import cli, train
from tokenlab.core.errors import ConfigError, StackError, TokenLabError
from tokenlab.data.text import ByteTokenizer
from tokenlab.evaluate import load
from tokenlab.generate import Generator, run
from tokenlab.ops.sample import Sampling

LENGTH, TOKENS = 16, 9
LONG = "What light through yonder window breaks"
GREEDY = Sampling(0.0)


def config(model: str, **data: Any) -> ConfigDict:
    """Two steps on rows of 16 bytes, or of the digits."""
    text = model == "decoder_lm"
    names = {"task": "next_token", "data": "shakespeare"} if text else {}
    found = train.default_config(model=model, **names)
    found.update(steps=2, batch_size=8, log_every=2, eval_every=2, checkpoint_every=2)
    found.eval.batch_size = 512
    found.optimizer.learning_rate = 1e-4  # so little that what is likeliest still depends on what was read
    found.model.update(size="nano" if text else "nano/2", stack="block*2")
    found.data.update(**data)
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained language model; not to be changed."""
    found = tmp_path_factory.mktemp("generate") / "lm"
    train.run(config("decoder_lm", length=LENGTH), found)
    return found


def said(workdir: Path, prompts: list[str], **how: Any) -> tuple[list[str], str]:
    """The texts, and what was printed."""
    out = io.StringIO()
    return run(workdir, prompts, **{"tokens": TOKENS, "sampling": GREEDY, "file": out, **how}), out.getvalue()


def by_hand(workdir: Path, ids: np.ndarray) -> str:
    """Greedy: the likeliest byte of a forward pass over everything so far, again and again, on longer sequences."""
    trained, room = load(workdir), 64
    model = replace(trained.model, length=room)
    apply = jax.jit(lambda params, ids: model.apply(params, {"ids": ids}).logits)
    row = np.zeros((1, room), np.int32)
    row[0, : len(ids)] = ids
    for at in range(len(ids), len(ids) + TOKENS):
        row[0, at] = np.asarray(apply(trained.params, row))[0, at - 1].argmax()
    return ByteTokenizer().decode(row[0, : len(ids) + TOKENS])


@pytest.mark.parametrize("prompt", ["ROMEO", "\N{GREEK SMALL LETTER BETA}\N{MUSICAL SYMBOL G CLEF}", LONG])
def test_greedy_text_is_that_of_whole_forward_passes(workdir: Path, prompt: str) -> None:
    """Also behind characters of several bytes, and behind more than the model was trained on at once."""
    (text,), printed = said(workdir, [prompt])
    assert text == by_hand(workdir, ByteTokenizer().encode(prompt))
    assert text.startswith(prompt) and printed == f"{text}\n"


def test_several_prompts_equal_each_alone_and_are_printed_in_order(workdir: Path) -> None:
    prompts = ["ROMEO:", "A", "Thou art"]
    texts, printed = said(workdir, prompts)
    assert texts == [said(workdir, [prompt])[0][0] for prompt in prompts]
    assert len({text.removeprefix(prompt) for prompt, text in zip(prompts, texts, strict=True)}) == 3
    assert printed == "".join(f"--- {row}\n{text}\n" for row, text in enumerate(texts))


def test_the_seed_decides(workdir: Path) -> None:
    first, again, other = (said(workdir, ["ROMEO:"], sampling=Sampling(1.0), seed=seed) for seed in (3, 3, 4))
    assert first == again and first != other


def test_the_command_prints_the_text_to_stdout_and_nothing_else(workdir: Path, capsys: Any) -> None:
    words = ["generate", f"--workdir={workdir}", f"--tokens={TOKENS}", "--temperature=0"]
    assert cli.main([*words, "--prompt=ROMEO:"]) == 0
    out, err = capsys.readouterr()
    assert out == said(workdir, ["ROMEO:"])[1]
    assert err.count("\n") == 1 and f"{TOKENS} tokens in " in err


def test_the_command_reads_prompts_and_draws_as_it_is_told(
    workdir: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("ROMEO:\n\N{GREEK SMALL LETTER BETA}\n", encoding="utf-8")
    words = ["generate", f"--workdir={workdir}", f"--prompts={file}", f"--tokens={TOKENS}"]
    assert cli.main([*words, "--temperature=1.5", "--top-k=40", "--top-p=0.9", "--seed=5"]) == 0
    how = {"sampling": Sampling(1.5, 40, 0.9), "seed": 5}
    expected = said(workdir, ["ROMEO:", "\N{GREEK SMALL LETTER BETA}"], **how)[1]
    assert capsys.readouterr().out == expected


def test_another_stack_on_the_same_weights(workdir: Path) -> None:
    """Pruned prompts, by the stack that is given; a longer prompt loses half of it."""
    prompt = "But soft, what"
    stack = {"eval.stack": "block + keep(0.5, by=norm) + block"}
    texts, _ = said(workdir, [prompt], overrides=stack)
    trained = load(workdir, stack)
    generator = Generator(trained.model, trained.params, prompt=LENGTH, new=TOKENS, sampling=GREEDY)
    ids = np.frombuffer(prompt.encode(), np.uint8).astype(np.int32)
    assert texts[0] == prompt + ByteTokenizer().decode(generator([ids])[0])
    with pytest.raises(StackError, match="cannot run token by token"):
        said(workdir, [prompt], overrides={"eval.stack": "block + skip(keep=0.5, by=random)(block)"})


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"prompt_tokens": 3}, "prompt 0 has 6 tokens; expected 1 to 3"),
        ({"prompt_tokens": 0}, "prompt is 0; expected a number of tokens >= 1"),
        ({"tokens": 0}, "new is 0; expected a number of tokens >= 1"),
    ],
)
def test_counts_that_do_not_fit_are_refused_before_anything_is_printed(
    workdir: Path, how: dict[str, int], says: str
) -> None:
    out = io.StringIO()
    with pytest.raises(TokenLabError, match=says):
        run(workdir, ["ROMEO:"], **{"tokens": TOKENS, "file": out, **how})
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("prompts", "says"),
    [([], "no prompt is given"), ([""], "prompt 0 has 0 tokens"), (["A", ""], "prompt 1 has 0 tokens")],
)
def test_without_a_prompt_there_is_nothing_to_go_on_from(
    workdir: Path, prompts: list[str], says: str
) -> None:
    with pytest.raises(TokenLabError, match=says):
        said(workdir, prompts)


@pytest.mark.slow
def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    train.run(config("vit"), tmp_path / "vit")
    with pytest.raises(
        ConfigError, match=r"this one trained 'vit' on data .* Train one with configs/lm_quickstart"
    ):
        said(tmp_path / "vit", ["ROMEO:"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt=A", "--temperature=-1"], "temperature is -1.0; expected at least 0"),
        (["--prompt=A", "--temperature=hot"], "--temperature"),
        (["--prompt=A", "--top-k=0"], "top_k is 0"),
        (["--prompt=A", "--top-k=2.5"], "--top-k"),
        (["--prompt=A", "--top-p=2"], "top_p is 2.0"),
        (["--prompt=A", "--tokens=many"], "--tokens"),
        (["--prompt=A", "--checkpoint=7"], "7"),
        (["--prompt=A", "--prompts=some.txt"], "--prompt=TEXT, or several with --prompts=FILE"),
        ([], "--prompt=TEXT, or several with --prompts=FILE"),
        (["--prompts=/nowhere/some.txt"], "--prompts=/nowhere/some.txt cannot be read"),
        (["--prompt=A", "--config.eval.stack=block*3"], "block"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    workdir: Path, capsys: Any, words: list[str], says: str
) -> None:
    assert cli.main(["generate", f"--workdir={workdir}", *words]) != 0
    out, err = capsys.readouterr()
    assert out == "" and says in err and "Traceback" not in err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    for folder, says in ((tmp_path / "none", "is not a folder"), (tmp_path, str(tmp_path))):
        assert cli.main(["generate", f"--workdir={folder}", "--prompt=A"]) != 0
        out, err = capsys.readouterr()
        assert out == "" and says in err and "Traceback" not in err


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on text with a vocabulary trained on it: its workdir and the file."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text(
        "\n\n".join(f"to be or not to be, {i}" for i in range(99)), encoding="utf-8"
    )
    given = {
        "name": "text",
        "files": (str(folder / "text.txt"),),
        "split_on": "\n\n",
        "tokenizer": "bpe(270)",
    }
    wanted = config("decoder_lm")
    wanted.data = train.default_config(model="decoder_lm", task="next_token", data="shakespeare").data
    with wanted.unlocked():
        wanted.data.update(**given, length=LENGTH)
    train.run(wanted, folder / "run")
    return folder / "run", folder / "text.txt"


def test_the_vocabulary_stays_with_the_run(words: tuple[Path, Path], tmp_path: Path) -> None:
    """Other text, of which another vocabulary of the same size would be made, changes no id; no text is needed."""
    workdir, file = words
    before, ids = said(workdir, ["to be"])[0], load(workdir).source.tokenizer.encode("to be or not")
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text("\n\n".join(f"whether tis nobler {i}" for i in range(99)), encoding="utf-8")
        np.testing.assert_array_equal(load(workdir).source.tokenizer.encode("to be or not"), ids)
        file.unlink()
        assert said(workdir, ["to be"])[0] == before
    finally:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="the weights know one vocabulary, which the run keeps"):
        said(workdir, ["to be"], overrides={"data.tokenizer": "bpe(280)"})


def test_what_found_no_room_is_told(workdir: Path, capsys: Any) -> None:
    """A stack whose memory holds one token of all that want in: the text is another, and it is said so."""
    prompts = ["ROMEO: but soft"] * 12  # each row draws for itself
    for keep, note in ((0.08, True), (1.0, False)):
        stack = f"block + mod(keep={keep}, by=random, gate=one, room=1.0)(block)"
        said(workdir, prompts, overrides={"eval.stack": stack})
        assert ("found no room in it" in capsys.readouterr().err) == note


@pytest.mark.parametrize(
    "given", ["--seed=9223372036854775808", "--tokens=3000000000", "--prompt-tokens=99999999999"]
)
def test_numbers_that_are_too_large_are_refused_in_a_line(workdir: Path, capsys: Any, given: str) -> None:
    assert cli.main(["generate", f"--workdir={workdir}", "--prompt=A", given]) == cli.EXIT_ERROR
    out, err = capsys.readouterr()
    assert out == "" and "expected" in err and err.count("\n") == 1


def test_what_a_leak_is_worth_can_be_measured_on_trained_weights(workdir: Path) -> None:
    """The documented way: at evaluation a stack that looks ahead is refused, and taken with config.model.leaks=True."""
    stack = {"eval.stack": "block + skip(keep=0.5, by=norm)(block)"}
    with pytest.raises(StackError, match=r"config\.model\.leaks=True"):
        load(workdir, stack)
    assert load(workdir, {**stack, "model.leaks": "True"}).model.settings.leaks
