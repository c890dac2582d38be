"""The model for lm-evaluation-harness: what it tells is what `MBLM.score` and `generate` tell."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mblm import MBLM
from tests.cli.program import ENVIRONMENT
from tests.models import model, transformer

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from mblm.lm_eval import MBLMForHarness

TEXTS = ["The cat sat on the mat.", "A dog", "é" * 40]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" sat", " on the mat"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "until": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 9}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def net() -> MBLM:
    torch.manual_seed(0)
    return model(transformer(), seq_lens=[8, 4], num_tokens=257)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks of the texts."""
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, fields in TASKS.items():
        head = (
            f"task: mblm_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        )
        (tmp_path / f"{name}.yaml").write_text(head + fields)
    return tmp_path


def test_a_task_is_evaluated_by_scores(net: MBLM, tasks: Path, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path / "saved")
    results = lm_eval.simple_evaluate(
        model="mblm",
        model_args=f"pretrained={tmp_path / 'saved'},stride=8",
        tasks=[f"mblm_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    found, samples = results["results"], results["samples"]
    scores = net.score(TEXTS, stride=8)
    bits = sum(s.bits for s in scores) / sum(len(s) for s in scores)
    assert found["mblm_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert found["mblm_rolling"]["byte_perplexity,none"] == pytest.approx(2**bits, rel=1e-4)

    choices = [net.score(c, text, stride=8) for text in TEXTS for c in (" sat", " on the mat")]
    told = [r for sample in samples["mblm_choice"] for r in sample["filtered_resps"]]
    expected = [-s.bits * math.log(2) for s in choices]
    assert [float(nats) for nats, _ in told] == pytest.approx(expected, rel=1e-4)
    wins = [expected[2 * n] > expected[2 * n + 1] for n in range(len(TEXTS))]
    assert found["mblm_choice"]["acc,none"] == pytest.approx(sum(wins) / len(wins))

    for sample, text in zip(samples["mblm_until"], TEXTS, strict=True):
        (generation,) = net.generate_batch(
            [text.encode()[-23:]], max_bytes=9, temperature=0, stop=[b"e"], enable_progress=False
        )
        data = generation.data.removesuffix(b"e")
        assert sample["resps"] == [[data.decode(errors="replace")]]


def test_contexts_may_be_empty_and_longer_than_the_context(net: MBLM) -> None:
    harness = MBLMForHarness(net)
    asked = [("", "The cat"), ("x" * 100, "The cat"), ("The", ""), ("a", "b" * 100)]
    told = harness.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    expected = [
        net.score("The cat"),
        net.score("The cat", given="x" * 25),
        net.score(""),
        net.score("b" * 100, given="a"),
    ]
    for (nats, is_greedy), score in zip(told, expected, strict=True):
        assert nats == pytest.approx(-score.bits * math.log(2), rel=1e-4)
        assert is_greedy is score.is_greedy


def test_more_requests_than_are_scored_at_once(net: MBLM, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = MBLMForHarness(net)
    asked = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    together = harness.loglikelihood_rolling(asked, True)
    monkeypatch.setattr("mblm.lm_eval._AT_ONCE", 2)
    assert harness.loglikelihood_rolling(asked) == pytest.approx(together, rel=1e-5)
    assert harness.loglikelihood([]) == harness.generate_until([]) == []


def test_texts_are_sampled_where_a_task_says_so(net: MBLM) -> None:
    harness = MBLMForHarness(net, max_rows=2, weights="int8")
    options = {"until": "\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    asked = requests("generate_until", *[("a", {**options, "max_new_tokens": 20})] * 4)
    torch.manual_seed(1)
    texts = harness.generate_until(asked, True)
    assert len(set(texts)) > 1 and not any("\n" in text for text in texts)


def test_a_task_may_sample_and_tell_no_temperature(net: MBLM) -> None:
    options = {"until": [], "max_gen_toks": 9, "do_sample": True}
    asked = requests("generate_until", ("ab", options), ("ab", {**options, "temperature": 1.0}))
    lm = MBLMForHarness(net)
    texts = [(torch.manual_seed(0), lm.generate_until([one], True))[1] for one in asked]
    assert texts[0] == texts[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_harness_own_default_is_no_wish_for_a_gpu(net: MBLM, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path)
    assert MBLMForHarness(tmp_path, device="cuda:0").model.device.type == "cpu"
    with pytest.raises(ValueError, match="device: cuda:1 cannot be used"):
        MBLMForHarness(tmp_path, device="cuda:1")


def test_filters_mean_nothing_to_the_likeliest_bytes(net: MBLM) -> None:
    """Tasks that do not sample give them all the same, several of them, too."""
    greedy = {"until": [], "max_gen_toks": 9, "do_sample": False}
    filtered = {**greedy, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    asked = requests("generate_until", ("a", greedy), ("a", filtered))
    plain, same = MBLMForHarness(net).generate_until(asked, True)
    assert same == plain


def test_bad_arguments_are_refused(net: MBLM) -> None:
    with pytest.raises(ValueError, match="stride: expected a number from 1 to 32"):
        MBLMForHarness(net, stride=33)
    with pytest.raises(ValueError, match="max_rows: expected a number >= 1"):
        MBLMForHarness(net, max_rows=0)
    with pytest.raises(ValueError, match="max_gen_toks: expected a number >= 0, got -1"):
        MBLMForHarness(net, max_gen_toks=-1)
    for context, options, words in (
        ("a", {"max_gen_toks": -1}, "max_gen_toks: expected a number >= 0"),
        ("\ud800", {"max_gen_toks": 1}, "context: expected text that UTF-8 can encode"),
    ):
        with pytest.raises(ValueError, match=words):
            MBLMForHarness(net).generate_until(requests("generate_until", (context, options)), True)
    with pytest.raises(ValueError, match="weights: expected one of float32, bfloat16, int8"):
        MBLMForHarness(net, weights="int4")
    with pytest.raises(TypeError, match="unexpected keyword argument 'parallelize'"):
        MBLMForHarness(net, parallelize=True)
    with pytest.raises(ValueError, match="max_gen_toks: 256 bytes leave no room for a prompt"):
        MBLMForHarness(net).generate_until(requests("generate_until", ("a", {"until": []})), True)


@pytest.mark.slow
def test_the_harness_is_run_from_the_command_line(net: MBLM, tasks: Path, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-m", "mblm.lm_eval", "--model", "mblm"]
    command += ["--model_args", f"pretrained={tmp_path / 'saved'}", "--include_path", str(tasks)]
    done = subprocess.run(
        [*command, "--tasks", "mblm_rolling"],
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    bits = [line for line in done.stdout.splitlines() if "bits_per_byte" in line]
    assert len(bits) == 1
