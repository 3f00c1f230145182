"""Every on-policy objective through a whole run, from recipe to model; and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.prompts import on_policy_values, write_on_policy
from helpers.stopping import stopped_after
from safetensors.torch import load_file

from holdfast import run as runs
from holdfast.errors import DataError, HoldfastError, ModelError, RecipeError, TrainingError
from holdfast.language.model import load_policy
from holdfast.language.tokenizers import build_tokenizer
from holdfast.recipe import load_recipe
from holdfast.schema import AnyObjective, OnPolicySpec, kinds, names_of

KINDS = [
    n for spec in kinds(AnyObjective) if issubclass(spec, OnPolicySpec) for n in names_of(spec)
]
SMALL = {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> str:
    """Another model with the policy's tokenizer, in a directory."""
    folder = tmp_path_factory.mktemp("tuned")
    load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=5).save_pretrained(
        folder
    )
    return str(folder)


def trained(folder: Path, **changes) -> Path:
    return runs.train(load_recipe(str(write_on_policy(folder, **changes))))


def lines(run: Path, kind: str) -> list[dict]:
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def options_of(kind: str, tuned: str) -> dict:
    needs_teacher = kind in ("gkd", "minillm")
    return {"kind": kind} | ({"teacher_model_name_or_path": tuned} if needs_teacher else {})


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_tells_what_it_saw(tmp_path, tuned, kind, reused):
    changes = options_of(kind, tuned)
    # Completions of a random policy rarely end by themselves.
    changes["mask_truncated_completions"] = False
    if reused:
        changes |= {"num_iterations": 2, "steps_per_generation": 2}
    run = trained(tmp_path, **changes)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    steps = [line["objectives"]["rl"] for line in lines(run, "train")]
    assert len(steps) == 8
    for step in steps:
        metrics = step["metrics"]
        assert math.isfinite(step["loss"]) and metrics["completions/mean_length"] > 0
        assert {"entropy", "sampled_probability", "samples"} <= metrics.keys()
        assert {"approx_kl", "kl"} <= metrics.keys()
        assert ("negative_share" in metrics) == (kind != "gkd")
    # Before the first update the policy still is the one that sampled, and its own reference.
    assert steps[0]["metrics"]["approx_kl"] == pytest.approx(0.0, abs=1e-6) or kind == "minillm"
    assert steps[0]["metrics"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["metrics"]["kl"] > 1e-9
    # GKD has batches of the data's own completions, which nobody rewards.
    assert any("reward" in step["metrics"] for step in steps)
    assert lines(run, "eval")[-1]["objectives"]["rl"]["count"] == 6
    before = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL)
    after = load_file(run / "model" / "model.safetensors")
    embeddings = "model.embed_tokens.weight"
    assert not torch.equal(after[embeddings], before.model.state_dict()[embeddings])


@pytest.mark.parametrize("kind", ["reinforce", "ppo", "grpo", "lco_kl", "lco_mse"])
def test_a_preference_tuned_model_gives_every_token_its_advantage(tmp_path, tuned, kind):
    preference = {"reward_model": tuned, "beta_rm": 0.5}
    run = trained(tmp_path, kind=kind, preference=preference, num_iterations=2)
    assert len(lines(run, "train")) == 8


def test_log_probabilities_of_a_model_can_be_the_advantages(tmp_path, tuned):
    run = trained(tmp_path, kind="lco_log_cosh", log_probability_model=tuned, centre="logprob")
    assert len(lines(run, "train")) == 8


def test_dense_and_sparse_advantages_add_up_when_both_are_asked_for(tmp_path, tuned):
    preference = {"reward_model": tuned}
    both, dense = (
        trained(tmp_path / str(sparse), preference=preference, kind="lco_mse", **changes)
        for sparse, changes in ((True, {"sparse_advantages": True}), (False, {}))
    )
    shown = [lines(run, "train")[0]["objectives"]["rl"] for run in (both, dense)]
    assert "negative_share" in shown[0]["metrics"] and "negative_share" not in shown[1]["metrics"]
    assert shown[0]["loss"] != shown[1]["loss"]


def test_the_kl_to_the_reference_is_not_recorded_where_it_is_not_wanted(tmp_path):
    run = trained(tmp_path, kind="grpo", log_reference_kl=False)
    assert "kl" not in lines(run, "train")[-1]["objectives"]["rl"]["metrics"]


def test_padding_of_a_longer_vocabulary_is_cut_off_where_that_is_asked_for(tmp_path):
    longer = load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=5)
    longer.base.resize_token_embeddings(264)
    longer.save_pretrained(tmp_path / "longer")
    changes = {"kind": "gkd", "teacher_model_name_or_path": str(tmp_path / "longer")}
    with pytest.raises(ModelError, match="264 rows, the policy one of 260.*truncate_vocabulary"):
        trained(tmp_path / "refused", **changes)
    run = trained(tmp_path / "cut", **changes, truncate_vocabulary=True)
    assert all(math.isfinite(line["objectives"]["rl"]["loss"]) for line in lines(run, "train"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": [{"name": "numeric_anser"}]}, "numeric_answer"),
        ({"generator": "vllm"}, "built in memory"),
    ],
)
def test_what_cannot_work_is_found_before_the_data_is_read(tmp_path, changes, message):
    file = write_on_policy(tmp_path, **changes)
    for data in tmp_path.glob("*.jsonl"):
        data.write_text("not json\n")
    with pytest.raises(RecipeError, match=message):
        runs.train(load_recipe(str(file)))


def test_a_reward_that_can_be_learned_is(tmp_path):
    """Completions that begin with a digit are rewarded: a few dozen steps are enough."""
    values = on_policy_values(
        rewards=[{"name": "regex", "options": {"pattern": "^[0-9]"}}],
        batch_size=64,
        num_generations=16,
        max_completion_length=1,
    )
    values["schedule"]["stages"][0]["steps"] = 40
    values["training"] |= {"max_steps": 40, "learning_rate": 0.01, "eval_steps": 40}
    run = runs.train(load_recipe(str(write_on_policy(tmp_path, values))))
    rewards = [line["objectives"]["rl"]["metrics"]["reward"] for line in lines(run, "train")]
    assert sum(rewards[:3]) / 3 < 0.2 and sum(rewards[-3:]) / 3 > 0.8
    held_out = [line["objectives"]["rl"]["loss"] for line in lines(run, "eval")]
    assert held_out[-1] == -1.0


@pytest.mark.parametrize("schedule", ["mix", "alright", "maxright"])
def test_rewards_and_demonstrations_are_trained_together(tmp_path, schedule):
    values = on_policy_values(optimum=-1.0)
    values["objectives"]["sft"] = {
        "kind": "nll",
        "data": {"path": "prompts.jsonl", "held_out": 6, "probe": 4},
        "batch_size": 8,
        "optimum": 0.0,
    }
    values["schedule"] = {"kind": schedule, "weights": {"rl": 0.5, "sft": 0.5}}
    run = runs.train(load_recipe(str(write_on_policy(tmp_path, values))))
    chosen = {name for line in lines(run, "train") for name in line["objectives"]}
    assert chosen == ({"sft"} if schedule == "maxright" else {"rl", "sft"})
    if schedule == "maxright":  # Gaps of a reward are how far it is from its optimum.
        gaps = lines(run, "train")[0]["gaps"]
        assert 0.0 <= gaps["rl"] <= 0.5 < gaps["sft"]


def test_an_optimum_of_a_reward_is_found_by_training_on_it_alone(tmp_path):
    recipe = load_recipe(str(write_on_policy(tmp_path, optimum="auto")))
    (value,) = runs.find_optima(recipe).values()
    assert -1.0 <= value <= 0.0


def test_a_dotted_path_beside_the_recipe_is_a_reward(tmp_path):
    tmp_path.joinpath("mine.py").write_text(
        "def short(prompts, completions, completion_ids, **columns):\n"
        "    return [1.0 / len(ids) for ids in completion_ids]\n"
    )
    run = trained(tmp_path, rewards=[{"name": "mine.py:short", "weight": 2.0}])
    metrics = lines(run, "train")[0]["objectives"]["rl"]["metrics"]
    name = next(name for name in metrics if name.endswith("short/mean"))
    assert metrics["reward"] == pytest.approx(2 * metrics[name])


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 3}, r"num_generations is 3, which does not divide the 8"),
        ({"num_generations": 1}, r"num_generations: .*greater than or equal to 2"),
        ({"kind": "lco_kl", "beta": 0}, r"objectives\.rl\.beta"),
        ({"kind": "lco_kl", "num_generations": 1}, r"a group of 2 or more"),
        ({"kind": "reinforce", "num_generations": 1}, r"baseline leave_one_out compares"),
        ({"kind": "grpo", "delta": 1.1}, r"delta is 1\.1"),
        ({"kind": "pmd", "epsilon": 0.2}, r"unknown entry"),
        ({"kind": "lco_mse", "centre": "logprob"}, r"for dense advantages"),
        ({"rewards": []}, r"rewards is empty"),
        ({"kind": "grop"}, r"'grop' is not known; did you mean 'grpo'"),
        ({"kind": "gkd"}, r"teacher_model_name_or_path: is required"),
        ({"temprature": 1}, r"did you mean 'temperature'"),
        ({"temperature": 0}, r"objectives\.rl\.temperature"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_loaded(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(write_on_policy(tmp_path, **changes)))


def test_a_recipe_whose_reward_is_unknown_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(RecipeError, match=r"objectives\.rl\.rewards.*exact_match"):
        trained(tmp_path, rewards=[{"name": "exact_mach"}])


def test_a_reward_that_raises_names_itself_the_prompt_and_the_completion(tmp_path):
    tmp_path.joinpath("mine.py").write_text(
        "def broken(prompts, completions, completion_ids, **columns):\n    raise KeyError('x')\n"
    )
    with pytest.raises(TrainingError, match=r"broken(.|\n)*\+"):
        trained(tmp_path, rewards=[{"name": "mine.py:broken"}])


def test_a_prompt_longer_than_the_limit_is_refused_with_its_line(tmp_path):
    data = {"path": "prompts.jsonl", "held_out": 6, "probe": 4, "max_length": 3}
    with pytest.raises(DataError, match=r"prompts\.jsonl:\d+: the prompt has 4 tokens"):
        trained(tmp_path, data=data)


def test_a_teacher_with_another_tokenizer_is_refused_by_name(tmp_path):
    words = build_tokenizer("bpe", texts=["many words and many words"] * 3, vocab_size=270)
    load_policy("tiny-qwen2", tokenizer=words, config=SMALL).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ModelError, match="another tokenizer"):
        trained(tmp_path, kind="gkd", teacher_model_name_or_path="teacher")


def test_completions_that_never_end_are_an_error_where_only_ended_ones_count(tmp_path):
    with pytest.raises(TrainingError, match="max_completion_length 5"):
        trained(tmp_path, max_completion_length=5, mask_truncated_completions=True)


def test_batches_of_the_data_need_completions(tmp_path, tuned):
    folder = write_on_policy(tmp_path, kind="gkd", teacher_model_name_or_path=tuned).parent
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"prompt": row["prompt"], "answer": "1"}) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text)
    with pytest.raises(HoldfastError, match=r"lmbda is 0\.5"):
        runs.train(load_recipe(str(folder / "recipe.yaml")))


def test_a_run_on_half_used_rollouts_resumes_bit_for_bit(tmp_path):
    """Stopped in the middle of a batch of rollouts, with a critic, adapters and dropout."""
    changes = {"kind": "ppo", "num_iterations": 2, "steps_per_generation": 3, "num_generations": 2}
    values = on_policy_values(**changes)
    values["policy"]["lora"] = {"r": 4, "lora_dropout": 0.2}
    values["schedule"]["stages"][0]["steps"] = 9
    values["training"] |= {"max_steps": 9, "save_steps": 1, "save_total_limit": 20}
    recipe = load_recipe(str(write_on_policy(tmp_path, values)))
    run = runs.train(recipe)
    final = "checkpoints/step-00000009"
    tensors = {n: load_file(run / final / f"{n}.safetensors") for n in ("policy", "optimizer")}
    expected = comparable(run)
    for stopped in (1, 4, 7):
        stopped_after(run, stopped)
        runs.resume(run)
        for name, before in tensors.items():
            after = load_file(run / final / f"{name}.safetensors")
            assert all(torch.equal(after[key], before[key]) for key in before)
        assert comparable(run) == expected


def comparable(run: Path) -> list[dict]:
    found = lines(run, "train") + lines(run, "eval")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def test_the_resolved_recipe_of_a_run_reads_back_the_same(tmp_path):
    run = trained(tmp_path, kind="dapo", dynamic_sampling=True, mask_truncated_completions=False)
    again = load_recipe(str(run / "recipe.yaml"))
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again.fingerprint() == recipe.fingerprint()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["objectives"]["rl"]["kind"] == "dapo"


def test_pmd_compares_the_ratio_of_a_sequence_with_its_advantage_once(tmp_path):
    """Not once for every token: the loss of equal ratios is half the mean of A^2 / (tau |y|)."""
    from accelerate import Accelerator

    from holdfast.assemble import assemble

    recipe = load_recipe(str(write_on_policy(tmp_path, kind="pmd", tau=0.5)))
    assembly = assemble(recipe, Accelerator(cpu=True))
    objective = assembly.objectives["rl"]
    rows = objective.source.next()
    terms = objective.loss(assembly.policy, rows)
    amounts = [float(row.signals["advantages"][0]) for row in rows]
    expected = sum(0.5 * a**2 / 0.5 / row.counted for a, row in zip(amounts, rows, strict=True))
    assert terms.total.item() == pytest.approx(expected, rel=1e-4) and terms.count == len(rows)


def test_rewards_that_judge_only_some_prompts_are_fine_wherever_a_batch_is_cut(tmp_path):
    tmp_path.joinpath("mine.py").write_text(
        "def most(prompts, completions, completion_ids, answer, **columns):\n"
        "    return [None if int(a) == 7 else 0.1 * len(c) for a, c in zip(answer, completions)]\n"
    )
    run = trained(tmp_path, rewards=[{"name": "mine.py:most"}], micro_batch_size=1, batch_size=24)
    assert 0 < lines(run, "eval")[-1]["objectives"]["rl"]["count"] <= 6
    assert "rewards/mine.py:most/mean" in lines(run, "train")[-1]["objectives"]["rl"]["metrics"]


def test_a_step_whose_completions_were_all_cut_off_teaches_nothing_and_is_no_failure(tmp_path):
    changes = {"mask_truncated_completions": True, "steps_per_generation": 4, "batch_size": 4}
    values = on_policy_values(**changes, max_completion_length=40)
    values["training"]["max_refusals"] = 0
    run = runs.train(load_recipe(str(write_on_policy(tmp_path, values))))
    counts = [line["objectives"]["rl"]["count"] for line in lines(run, "train")]
    assert len(counts) == 8 and 0 in counts and any(counts) and not lines(run, "event")


def test_an_adapter_that_a_run_wrote_can_teach_the_next(tmp_path, tuned):
    values = on_policy_values()
    values["policy"] = {"model_name_or_path": tuned, "lora": {"r": 4}}
    first = runs.train(load_recipe(str(write_on_policy(tmp_path / "one", values))))
    values = on_policy_values(
        kind="lco_kl", preference={"reward_model": str(first / "model"), "reference_model": tuned}
    )
    values["policy"] = {"model_name_or_path": tuned, "lora": {"r": 4}}
    second = runs.train(load_recipe(str(write_on_policy(tmp_path / "two", values))))
    assert len(lines(second, "train")) == 8
    with pytest.raises(ModelError, match="trained on a preset"):
        preset = on_policy_values()
        preset["policy"]["lora"] = {"r": 4}
        third = runs.train(load_recipe(str(write_on_policy(tmp_path / "three", preset))))
        load_policy(str(third / "model"))


def test_an_optimum_depends_on_the_models_and_code_behind_its_rewards(tmp_path, tuned):
    from accelerate import Accelerator

    from holdfast.assemble import assemble

    code = tmp_path / "mine.py"
    code.write_text("def one(prompts, **columns):\n    return [1.0] * len(prompts)\n")
    rewards = [{"name": "mine.py:one"}]
    model = shutil.copytree(tuned, tmp_path / "model")
    preference = {"reward_model": str(model)}
    path = write_on_policy(tmp_path, kind="lco_kl", preference=preference, rewards=rewards)

    def key() -> str:
        return assemble(load_recipe(str(path)), Accelerator(cpu=True)).keys["rl"]

    before = key()
    assert key() == before
    code.write_text(code.read_text().replace("1.0", "2.0"))
    after = key()
    assert after != before
    load_policy("tiny-qwen2", tokenizer=build_tokenizer(), config=SMALL, seed=6).save_pretrained(
        model
    )
    assert key() not in (before, after)
