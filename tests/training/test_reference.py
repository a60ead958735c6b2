"""What the KL's reference is: the policy as it came, whatever is trained of it, or the one that is named."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import peft
from datasets import Dataset
from safetensors.torch import load_file

from grade_kernels import GumbelNoise
from grade_kernels.training import FrozenCopy, NamedAdapter, OtherModel, WithoutAdapter, checkpoints, grade_loss
from grade_kernels.training.reference import changes_nothing
from tests.support.trainers import PROMPTS, build, same, weights
from tests.support.training_models import BagReward, gradients, policy, prompts, worst_difference

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **TARGETS),
    "lora with every bias": lambda: peft.LoraConfig(r=2, bias="all", **TARGETS),
    "lora with a head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=2, **TARGETS),
}


def shaken(model, by=0.3, seed=11):
    """The model with noise on everything that requires a gradient, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                )
    return model


def trained_adapter(kind="lora", name="default", family="llama", dtype=torch.float32, by=0.3):
    base = policy(family, dtype=dtype, attention_bias=True) if family == "llama" else policy(family, dtype=dtype)
    return shaken(peft.get_peft_model(base, KINDS[kind](), adapter_name=name), by)


def kls(trainer):
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


def loss_of(model, **options):
    ids, mask = prompts()
    options = {"beta": 0.3, "eps": 0.0, "feedback_hops": "exact", "max_new_tokens": 5, "tau": 0.7} | options
    return grade_loss(model, BagReward(), ids, mask, noise=GumbelNoise(4), **options)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_trained_adapter_is_its_own_reference(tmp_path, kind):
    model = trained_adapter(kind)
    before = weights_of(model)
    trainer = build(tmp_path, model=model, max_steps=3, eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    assert isinstance(trainer.reference, FrozenCopy)
    assert trainer.ref_model is None
    assert trainer.evaluate()["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert same(weights_of(model), before), "an evaluation leaves the policy as it was"
    trainer.train()
    assert kls(trainer)[0] == 0.0
    assert kls(trainer)[-1] > 1e-4


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "llama") for kind in KINDS), ("lora with every bias", "phi"), ("lora", "qwen2")]
)
def test_a_frozen_copy_equals_a_copy_of_the_whole_model(kind, family):
    model = trained_adapter(kind, family=family, dtype=torch.float64)
    if family == "phi":
        assert model.get_output_embeddings().bias.requires_grad, "the LM head's own bias is trained too"
    whole, frozen = copy.deepcopy(model).requires_grad_(False), FrozenCopy(model)
    assert sum(value.numel() for value in frozen.state().values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    shaken(model, 0.1, seed=12)
    flags = [p.requires_grad for p in model.parameters()]
    truth, ours = (loss_of(model, ref_model=reference) for reference in (whole, frozen))
    assert truth.kl.min() > 1e-3
    torch.testing.assert_close(ours.kl, truth.kl, rtol=1e-12, atol=1e-12)
    expected = gradients(truth.loss, model)
    assert worst_difference(gradients(ours.loss, model), expected) < 1e-12
    assert flags == [p.requires_grad for p in model.parameters()]


def test_an_adapter_by_another_name_and_several_at_once(tmp_path):
    model = trained_adapter(name="first")
    model.add_adapter("second", KINDS["lora"]())
    model.base_model.set_adapter(["first", "second"])
    shaken(model)
    trainer = build(tmp_path, model=model, max_steps=2, learning_rate=0.1)
    trainer.train()
    assert kls(trainer)[0] == 0.0 < kls(trainer)[1]
    assert list(model.active_adapters) == ["first", "second"]


@pytest.mark.parametrize("disturbed", ["B", "layer norm", "other adapter"])
def test_only_a_fresh_adapter_is_switched_off(tmp_path, disturbed):
    model = peft.get_peft_model(policy("llama", dtype=torch.float32), KINDS["lora"]())
    assert changes_nothing(model)
    assert isinstance(build(tmp_path, model=model).reference, WithoutAdapter)
    if disturbed == "B":
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = 1e-3
    elif disturbed == "layer norm":
        next(p for name, p in model.named_parameters() if "layernorm" in name).requires_grad_(True)
    else:
        model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, **TARGETS))
        model.base_model.set_adapter(["default", "other"])
    assert not changes_nothing(model)
    trainer = build(tmp_path, model=model, max_steps=2, learning_rate=0.1)
    assert isinstance(trainer.reference, FrozenCopy)
    trainer.train()
    assert kls(trainer)[0] == 0.0 < kls(trainer)[1]


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", True, False])
def test_a_peft_config_starts_from_its_own_reference(tmp_path, start):
    adapter = peft.LoraConfig(r=2, init_lora_weights=start, **TARGETS)
    trainer = build(
        tmp_path, model=policy("llama", dtype=torch.float32), peft_config=adapter, max_steps=2, learning_rate=0.1
    )
    assert isinstance(trainer.reference, WithoutAdapter if start in ("gaussian", True) else FrozenCopy)
    trainer.train()
    assert kls(trainer)[0] == 0.0 < kls(trainer)[1]


def test_a_named_adapter_is_the_reference(tmp_path):
    model = trained_adapter(name="policy", dtype=torch.float64)
    model.add_adapter("sft", peft.LoraConfig(r=2, init_lora_weights=False, **TARGETS))
    model.set_adapter("policy")
    other = copy.deepcopy(model)
    other.set_adapter("sft")
    truth = loss_of(model, ref_model=other.requires_grad_(False))
    flags = [p.requires_grad for p in model.parameters()]
    ours = loss_of(model, ref_adapter_name="sft")
    torch.testing.assert_close(ours.kl, truth.kl, rtol=1e-12, atol=0)
    expected = gradients(truth.loss, model)
    assert worst_difference(gradients(ours.loss, model), expected) < 1e-12
    assert (model.active_adapter, list(model.active_adapters)) == ("policy", ["policy"])
    assert flags == [p.requires_grad for p in model.parameters()]
    trainer = build(tmp_path, model=model.float(), ref_adapter_name="sft", max_steps=1)
    assert isinstance(trainer.reference, NamedAdapter)
    sft = {name: value for name, value in weights(trainer).items() if ".sft." in name}
    trainer.train()
    assert kls(trainer)[0] > 1e-3
    assert same(sft, {name: value for name, value in weights(trainer).items() if ".sft." in name})


@pytest.mark.parametrize("reference", ["named", "without"])
def test_what_was_frozen_by_hand_stays_frozen(reference):
    model = trained_adapter(name="policy", dtype=torch.float64)
    model.add_adapter("sft", KINDS["lora"]())
    model.set_adapter("policy")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_B" in name)
    flags = [p.requires_grad for p in model.parameters()]
    options = {"ref_adapter_name": "sft"} if reference == "named" else {"ref_model": WithoutAdapter()}
    loss_of(model, **options).loss.backward()
    assert flags == [p.requires_grad for p in model.parameters()]


def test_a_reference_of_ones_own(tmp_path):
    other = policy("llama", seed=5, dtype=torch.float32)
    other.save_pretrained(tmp_path / "other")
    by_name = build(tmp_path / "a", model=policy("llama", dtype=torch.float32), ref_model=str(tmp_path / "other"))
    by_name.train()
    given = build(tmp_path / "b", model=policy("llama", dtype=torch.float32), ref_model=other)
    given.train()
    assert given.ref_model is other
    assert not any(p.requires_grad for p in other.parameters())
    assert kls(by_name) == kls(given)
    assert kls(given)[0] > 0.1
    watched = build(tmp_path / "c", model=policy("llama", dtype=torch.float32), ref_model=other, beta=0.0, max_steps=1)
    watched.train()
    assert kls(watched) == kls(given)[:1], "without a factor it is logged"


def test_references_that_can_not_be_are_refused_at_construction(tmp_path):
    model = policy("llama", dtype=torch.float32)

    def refused(message, error=ValueError, model=model, **changes):
        with pytest.raises(error, match=message):
            build(tmp_path, model=model, **changes)

    refused("ref_model must share the policy's vocabulary: its LM head scores 60", ref_model=llama(vocab_size=60))
    refused("leaves no room for a prompt in ref_model's 6 positions", ref_model=llama(max_position_embeddings=6))
    refused("more than ref_model's 8 positions", ref_model=llama(max_position_embeddings=8))
    refused("ref_model shares .* parameters with model", ref_model=model)
    refused("ref_model must cap its logits", ref_model=policy("gemma2", dtype=torch.float32))
    refused("ref_model must be a name, a causal language model or a Reference", TypeError, ref_model=3)
    refused("ref_model 'no/body' was not found", ref_model="no/body")
    refused("ref_adapter_name must be one of the model's adapters", ref_adapter_name="sft")
    adapted = trained_adapter()
    refused(r"one of the model's adapters \['default'\], got 'sft'", model=adapted, ref_adapter_name="sft")
    refused("is the adapter that the policy itself uses", model=adapted, ref_adapter_name="default")
    refused("not both", model=adapted, ref_adapter_name="default", ref_model=llama())
    refused("ref_adapter_name must be an adapter's name", TypeError, ref_adapter_name=1)
    adapted.add_adapter("sft", KINDS["lora"]())
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".sft." in name)
    refused("must not be trained, but", model=adapted, ref_adapter_name="sft")


def llama(**changes):
    import transformers as tf

    from tests.support.training_models import SIZES

    return tf.LlamaForCausalLM(tf.LlamaConfig(**(SIZES | changes)))


def test_a_prompt_too_long_for_the_reference_is_named_when_it_comes(tmp_path):
    long = Dataset.from_dict({"prompt": ["w4", "w5", "w6 " * 9]})
    options = {"ref_model": llama(max_position_embeddings=12), "model": policy("llama", dtype=torch.float32)}
    with pytest.raises(ValueError, match=r"train_dataset\[2\]: .* more than ref_model's 12 positions"):
        build(tmp_path, dataset=long, **options)
    stream = long.to_iterable_dataset()  # no length: examples are seen when their batch comes
    trainer = build(tmp_path, dataset=stream, eval_dataset=stream, shuffle_dataset=False, **options)
    with pytest.raises(ValueError, match="more than ref_model's 12 positions"):
        trainer.train()
    with pytest.raises(ValueError, match="more than ref_model's 12 positions"):
        trainer.evaluate()


def test_the_functional_core_says_which_reference_it_takes():
    model = trained_adapter(dtype=torch.float64)
    with pytest.warns(UserWarning, match="came with an adapter that has been trained"):
        bare = loss_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(loss_of(model).kl, bare.kl), "it is said once"
        assert torch.equal(loss_of(trained_adapter(dtype=torch.float64), ref_model=WithoutAdapter()).kl, bare.kl)
        fresh = peft.get_peft_model(policy("llama"), KINDS["lora"]())
        assert loss_of(fresh).kl.abs().max() == 0
        assert loss_of(model, ref_model=FrozenCopy(model)).kl.abs().max() == 0
        other = policy("llama", seed=3)
        assert torch.equal(loss_of(model, ref_model=OtherModel(other)).kl, loss_of(model, ref_model=other).kl)
    with pytest.raises(TypeError, match="ref_model must be a model or a reference, got str"):
        loss_of(model, ref_model="gpt2")
    with pytest.raises(ValueError, match="not both"):
        loss_of(model, ref_model=other, ref_adapter_name="default")
    frozen = FrozenCopy(model)
    next(p for name, p in model.named_parameters() if "layernorm" in name).requires_grad_(True)
    with pytest.raises(ValueError, match="training would change the reference too: 1 parameters"):
        loss_of(model, ref_model=frozen)
    with pytest.raises(ValueError, match="parameters outside of the adapter require gradients"):
        loss_of(model)
    with pytest.raises(ValueError, match="a copy of another model"):
        loss_of(policy("llama"), ref_model=frozen)
    with pytest.raises(ValueError, match="all are frozen"):
        FrozenCopy(policy("llama").requires_grad_(False))


@pytest.mark.parametrize("reference", ["frozen", "named", "without"])
def test_a_merged_policy_stays_merged_to_the_bit(reference):
    model = trained_adapter(name="policy", dtype=torch.float64)
    model.add_adapter("sft", peft.LoraConfig(r=2, init_lora_weights=False, **TARGETS))
    model.set_adapter("policy")
    options = {
        "frozen": {"ref_model": FrozenCopy(model)},
        "named": {"ref_adapter_name": "sft"},
        "without": {"ref_model": WithoutAdapter()},
    }[reference]
    shaken(model, 0.1, seed=12)
    with torch.no_grad():
        expected = loss_of(model, **options)
        model.merge_adapter()
        before = weights_of(model)
        merged = loss_of(model, **options)
    assert expected.kl.min() > 1e-3
    torch.testing.assert_close(merged.kl, expected.kl, rtol=1e-9, atol=1e-9)
    assert same(before, weights_of(model))
    assert all(m.merged_adapters == ["policy"] for m in model.modules() if hasattr(m, "lora_A"))


# ---------------------------------------------------------------------------------------------------- checkpoints


def saving(path, model, **changes):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    return build(path, model=model, **(options | changes))


def test_a_checkpoint_holds_one_adapter_and_the_reference_apart(tmp_path):
    trainer = saving(tmp_path, trained_adapter(name="default"))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    folder = tmp_path / "checkpoint-4"
    assert not [path for path in folder.iterdir() if path.is_dir()]
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == sum(p.requires_grad for p in trainer.model.parameters())
    assert not list((tmp_path / "final").glob("grade_reference*"))
    assert checkpoints.damage(folder) is None
    again = peft.PeftModel.from_pretrained(policy("llama", dtype=torch.float32, attention_bias=True), folder)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("given", ["as it came", "as it was saved", "fresh"])
def test_a_resumed_run_keeps_the_reference_of_its_beginning(tmp_path, given):
    whole = saving(tmp_path / "whole", trained_adapter())
    whole.train()
    saving(tmp_path / "part", trained_adapter(), max_steps=4).train()
    model = {
        "as it came": trained_adapter,
        "as it was saved": lambda: peft.PeftModel.from_pretrained(
            policy("llama", dtype=torch.float32, attention_bias=True), tmp_path / "part" / "checkpoint-2",
            is_trainable=True,
        ),
        "fresh": lambda: peft.get_peft_model(
            policy("llama", dtype=torch.float32, attention_bias=True), KINDS["lora"]()
        ),
    }[given]()  # fmt: skip
    trainer = saving(tmp_path / "part", model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert kls(trainer) == kls(whole)
    assert same(weights(trainer), weights(whole))


def test_a_run_from_a_fresh_adapter_stays_with_the_bare_model(tmp_path):
    def fresh():
        torch.manual_seed(3)
        return peft.get_peft_model(policy("llama", dtype=torch.float32), KINDS["lora"]())

    whole = saving(tmp_path, fresh())
    whole.train()
    saved = peft.PeftModel.from_pretrained(
        policy("llama", dtype=torch.float32), tmp_path / "checkpoint-2", is_trainable=True
    )
    trainer = saving(tmp_path, saved)
    assert isinstance(trainer.reference, FrozenCopy)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert isinstance(trainer.reference, WithoutAdapter)
    assert kls(trainer) == kls(whole)


def test_a_whole_model_that_came_trained_is_not_its_own_reference(tmp_path, caplog):
    whole = saving(tmp_path / "run", policy("llama", dtype=torch.float32))
    whole.train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert json.loads((folder / "grade_reference.json").read_text())["kind"] == "OtherModel"
    with pytest.raises(ValueError, match=r"was trained with another reference .* give model as at the beginning"):
        saving(tmp_path / "run", type(whole.model).from_pretrained(folder)).train(resume_from_checkpoint=str(folder))
    trained = type(whole.model).from_pretrained(folder)
    trainer = saving(tmp_path / "run", trained, ref_model=policy("llama", dtype=torch.float32))
    trainer.train(resume_from_checkpoint=str(folder))
    assert kls(trainer) == kls(whole)
    assert not any("another reference" in record.getMessage() for record in caplog.records)
    trainer = saving(tmp_path / "run", trained, ref_model=policy("llama", seed=9, dtype=torch.float32))
    trainer.train(resume_from_checkpoint=str(folder))
    assert any("another reference" in record.getMessage() for record in caplog.records)


def test_a_copy_of_another_policy_is_not_taken(tmp_path):
    saving(tmp_path, trained_adapter()).train()
    frozen = FrozenCopy(trained_adapter("ia3"))
    with pytest.raises(ValueError, match=r"holds the reference of another policy: .* differ in name or shape"):
        frozen.load(tmp_path / "checkpoint-2" / "grade_reference.safetensors")
