"""Heads on the last token: what they start at, what `transformers` makes of them, and the losses in closed form."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reward_scores import reward_scores

from twinloop.common.errors import UserError
from twinloop.domains.domain import Domain
from twinloop.models.config import DecoderConfig
from twinloop.models.directory import load_config, save_model
from twinloop.models.new_tokenizer import train_tokenizer
from twinloop.models.rope import Rope
from twinloop.training.forms import is_held_out
from twinloop.training.heads import attach_head, load_reward_model, tree_scores
from twinloop.training.loop import _accumulate, run_training
from twinloop.training.method import load_method
from twinloop.training.objectives import ClassifierLoss, RewardLoss
from twinloop.training.packing import pack
from twinloop.training.runtime import Runtime
from twinloop.training.stream import Step, micro_batches
from twinloop.training.tree import collate, labelled, pair, sequence_scores
from twinloop.training.weights import get_weights, new_decoder

BASE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False},
    "mistral": {"family": "mistral"},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "smollm3": {"family": "smollm3", "rotary_layers": (True, False)},
    "gemma3_text": {
        "family": "gemma3_text",
        "qk_norm": True,
        "norm_plus_one": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": 8.0,
        "query_scale": 0.25,
        "windows": (16, None),
        "window_rope": Rope(theta=10_000.0),
    },
}
CPU = torch.device("cpu")
SETTINGS = {"learning_rate": 0.01, "batch_tokens": 256, "seq_len": 128, "epochs": 3}


def asked(text):
    return [{"role": "user", "content": text}]


PREFERENCES = [
    {"prompt": asked(f"say {n}"), "chosen": f"it is {n}, of course", "rejected": f"no {n}"} for n in range(60)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([str(row) for row in PREFERENCES], 300)


def headed(tokenizer, labels, **changes):
    """A network whose head is not at 0 any more."""
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, **(BASE | changes))
    model = new_decoder(config, seed=0)
    attach_head(model, labels, tokenizer, tokenizer.stop_ids)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def sequences(tokenizer):
    """Of several lengths, in a batch of `transformers` with padding."""
    return [tokenizer.encode_prompt(asked("say" + " so" * n)) + tokenizer.encode_answer("it is" * n) for n in (1, 4, 2)]


@pytest.mark.parametrize("labels", [("reward",), ("red", "green", "blue")])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it_as_sequence_classification_with_the_same_scores(tmp_path, tokenizer, family, labels):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = headed(tokenizer, labels, **FAMILIES[family])
    save_model(tmp_path, model.config, get_weights(model), tokenizer)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.num_labels == len(labels)
    assert theirs.config.id2label == dict(enumerate(labels))
    texts = sequences(tokenizer)
    batch = AutoTokenizer.from_pretrained(tmp_path).pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**batch).logits.numpy()
    found = np.concatenate(tree_scores(model, [labelled(tokens) for tokens in texts], seq_len=128))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert load_config(tmp_path) == model.config


def test_a_reward_model_that_transformers_saved_gives_its_scores(tmp_path, tokenizer):
    from transformers import AutoModelForSequenceClassification

    model = headed(tokenizer, ("reward",), tie_word_embeddings=False)
    save_model(tmp_path / "ours", model.config, get_weights(model), tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    texts = sequences(tokenizer)
    with torch.no_grad():
        expected = [theirs(torch.tensor([tokens])).logits.item() for tokens in texts]
    np.testing.assert_allclose(reward_scores(tmp_path / "theirs", texts), expected, atol=1e-4)


def test_only_a_reward_model_gives_rewards(tmp_path, tokenizer):
    model = headed(tokenizer, ("red", "green"))
    save_model(tmp_path, model.config, get_weights(model), tokenizer)
    with pytest.raises(UserError, match="gives labels and is no reward model"):
        load_reward_model(tmp_path)


def test_padding_is_none_of_the_tokens_that_end_a_text(tokenizer):
    model = new_decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.stop_id, **BASE), seed=0)
    attach_head(model, ("reward",), tokenizer, tokenizer.stop_ids)
    assert model.config.pad_token_id not in (None, *tokenizer.stop_ids)
    with pytest.raises(UserError, match="none is left to pad with"):
        attach_head(model, ("reward",), tokenizer, tokenizer.special_ids)


def test_the_tokenizer_beside_a_head_pads_as_its_config_says(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    model = headed(tokenizer, ("reward",))
    config = model.config.model_copy(update={"pad_token_id": tokenizer.bos_id})
    save_model(tmp_path, config, get_weights(model), tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == tokenizer.bos_id


def pairs_of(tokenizer, count=12):
    return [
        pair(
            tokenizer.encode_prompt(row["prompt"]),
            tokenizer.encode_answer(row["chosen"]),
            tokenizer.encode_answer(row["rejected"]),
        )
        for row in PREFERENCES[:count]
    ]


def batch_of(trees, seq_len=256):
    return collate(pack(trees, seq_len).rows, seq_len)


def test_first_reward_loss_is_ln_2(tokenizer):
    model = new_decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **BASE), seed=0)
    attach_head(model, ("reward",), tokenizer, tokenizer.stop_ids)
    loss, metrics = RewardLoss(centring=0.1).loss(model, batch_of(pairs_of(tokenizer)))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["margin"] == 0


@pytest.mark.parametrize(("margin", "centring"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.01), (1.5, 0.1)])
def test_reward_loss_is_trls_formula_on_the_scores_of_transformers(tmp_path, tokenizer, margin, centring):
    """What TRL's RewardTrainer computes, written out here; each answer has a copy of its prompt."""
    from transformers import AutoModelForSequenceClassification

    model = headed(tokenizer, ("reward",))
    save_model(tmp_path, model.config, get_weights(model), tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    rows = PREFERENCES[:9]

    def scores(side):
        texts = [tokenizer.encode_prompt(row["prompt"]) + tokenizer.encode_answer(row[side]) for row in rows]
        return torch.cat([theirs(torch.tensor([tokens])).logits for tokens in texts])[:, 0]

    with torch.no_grad():
        chosen, rejected = scores("chosen"), scores("rejected")
        expected = -F.logsigmoid(chosen - rejected - margin).mean() + centring * torch.mean((chosen + rejected) ** 2)
        found, metrics = RewardLoss(margin=margin, centring=centring).loss(model, batch_of(pairs_of(tokenizer, 9)))
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["accuracy"].item() == pytest.approx((chosen > rejected).float().mean().item())


def test_classifier_loss_is_cross_entropy_and_starts_at_the_log_of_the_labels(tokenizer):
    model = new_decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **BASE), seed=0)
    attach_head(model, ("red", "green", "blue"), tokenizer, tokenizer.stop_ids)
    texts = sequences(tokenizer)
    batch = batch_of([labelled(tokens, label) for label, tokens in enumerate(texts)])
    assert ClassifierLoss().loss(model, batch)[0].item() == pytest.approx(math.log(3), abs=1e-6)
    model = headed(tokenizer, ("red", "green", "blue"))
    alone = torch.cat([sequence_scores(model, batch_of([labelled(tokens)])) for tokens in texts])
    expected = -alone.log_softmax(1).diagonal().mean()
    assert ClassifierLoss().loss(model, batch)[0].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    "objective", [RewardLoss(margin=0.3, centring=0.1), ClassifierLoss()], ids=["reward", "labels"]
)
def test_micro_batches_add_up_to_the_whole_batch(tokenizer, objective):
    if isinstance(objective, RewardLoss):
        model, trees = headed(tokenizer, ("reward",)), pairs_of(tokenizer, 11)
    else:
        model = headed(tokenizer, ("red", "green", "blue"))
        trees = [labelled(tokenizer.encode("so " * n + "it is"), n % 3) for n in range(1, 12)]
    rows = pack(trees, 80).rows
    found = []
    for size in (None, 1):
        model.zero_grad()
        loss, _ = _accumulate(model, objective, Step(micro_batches(rows, 80, size)), CPU)
        found.append((loss, model.model.embed_tokens.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


def test_a_batch_in_rows_has_the_same_scores(tokenizer):
    """As CUDA computes it, by the visibility of tokens: here through each sequence alone."""
    model = headed(tokenizer, ("reward",))
    batch = collate(pack(pairs_of(tokenizer, 7), 64).rows, 64)
    laid_out = batch.in_rows()
    tokens = laid_out.tokens_BL.flatten()
    assert torch.equal(tokens[laid_out.last_S], batch.tokens_BL[0][batch.last_S])
    assert (tokens[laid_out.last_S] == tokenizer.stop_id).all()
    whole = [
        tokenizer.encode_prompt(row["prompt"]) + tokenizer.encode_answer(row[side])
        for row in PREFERENCES[:7]
        for side in ("chosen", "rejected")
    ]
    alone = sorted(float(tree_scores(model, [labelled(each)], seq_len=64)[0][0, 0]) for each in whole)
    with torch.no_grad():
        together = sorted(sequence_scores(model, batch)[:, 0].tolist())
    np.testing.assert_allclose(together, alone, atol=1e-5)


def trained(tokenizer, tmp_path, **changes):
    method = load_method("reward", tmp_path)
    settings = method.settings.model_validate(SETTINGS | changes)
    model = new_decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **BASE), seed=0)
    built = method.build(PREFERENCES, model, tokenizer, settings, Runtime(seed=1, threads=1), Domain())
    return model, built, run_training(model, *built, settings, checkpoint_dir=None)


def test_reward_training_prefers_what_people_chose_also_of_prompts_that_it_never_saw(tmp_path, tokenizer):
    model, (_, batches), result = trained(tokenizer, tmp_path)
    assert result.initial_loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.loss < 0.3
    held_out = [row for row in PREFERENCES if is_held_out(row)]
    assert 0 < len(held_out) < 20
    assert sum(len(row) for row in batches.packing.rows) == len(PREFERENCES) - len(held_out)
    save_model(tmp_path, model.config, get_weights(model), tokenizer)
    for row in held_out:
        prompt = tokenizer.encode_prompt(row["prompt"])
        texts = [prompt + tokenizer.encode_answer(row[side]) for side in ("chosen", "rejected")]
        chosen, rejected = reward_scores(tmp_path, texts)
        assert chosen > rejected


def test_a_head_under_an_adapter_needs_it_merged(tmp_path):
    settings = load_method("reward", tmp_path).settings
    with pytest.raises(ValueError, match="merge: true"):
        settings.model_validate(SETTINGS | {"lora": {"rank": 2}})


@pytest.mark.parametrize("of_base", [False, True], ids=["a new head", "the base's head"])
def test_an_adapter_and_a_head_train_together(tmp_path, tokenizer, of_base):
    from twinloop.training.adapters import attach_adapter

    method = load_method("reward", tmp_path)
    settings = method.settings.model_validate(SETTINGS | {"lora": {"rank": 2, "merge": True}})
    model = new_decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **BASE), seed=0)
    if of_base:
        model = headed(tokenizer, ("reward",))
    before = model.model.embed_tokens.weight.detach().clone()
    head = model.score.weight.detach().clone() if of_base else torch.zeros(1, BASE["hidden_size"])
    attach_adapter(model, settings.lora.form, seed=1)
    built = method.build(PREFERENCES, model, tokenizer, settings, Runtime(seed=1, threads=1), Domain())
    result = run_training(model, *built, settings, checkpoint_dir=None)
    assert result.loss < result.initial_loss
    assert (model.score.weight != head).any()
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert "score.weight" in get_weights(model)


COLOURS = ("red", "green", "blue")


class Colours(Domain):
    """Texts that name a colour."""

    labels = COLOURS

    def gold(self, facts):
        return facts


def coloured(count, seed):
    chosen = np.random.default_rng(seed).choice(COLOURS, count)
    return [{"prompt": asked(f"the {n} is {colour} today"), "facts": str(colour)} for n, colour in enumerate(chosen)]


def classified(tokenizer, tmp_path, domain=None, base=None, **changes):
    method = load_method("classify", tmp_path)
    settings = method.settings.model_validate(SETTINGS | changes)
    model = base or new_decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **BASE), seed=0)
    built = method.build(coloured(150, 1), model, tokenizer, settings, Runtime(seed=1, threads=1), domain or Colours())
    return model, run_training(model, *built, settings, checkpoint_dir=None)


def test_classify_learns_the_labels_of_texts_that_it_never_saw(tmp_path, tokenizer):
    model, result = classified(tokenizer, tmp_path)
    assert result.initial_loss == pytest.approx(math.log(3), abs=1e-6)
    assert model.config.labels == COLOURS
    rows = coloured(60, 2)
    trees = [labelled(tokenizer.encode_prompt(row["prompt"])) for row in rows]
    found = [COLOURS[int(scores[0].argmax())] for scores in tree_scores(model, trees, seq_len=128)]
    assert np.mean([label == row["facts"] for label, row in zip(found, rows, strict=True)]) > 0.9
    ends = {tree.segments[0].tokens[-1] for tree in trees}
    assert model.config.pad_token_id not in ends


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_words_starts_as_the_vocabularys_logits_of_their_first_tokens(tmp_path, tokenizer, tied):
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, tie_word_embeddings=tied, **BASE)
    model = new_decoder(config, seed=0)
    prompt = tokenizer.encode_prompt(asked("the sky is blue"))
    words = [tokenizer.encode_answer(label)[0] for label in COLOURS]
    with torch.no_grad():
        vocabulary = model.logits(model.hidden(torch.tensor([prompt]), torch.arange(len(prompt))[None]))[0, -1]
    method = load_method("classify", tmp_path)
    settings = method.settings.model_validate(SETTINGS | {"head": "words"})
    method.build(coloured(9, 1), model, tokenizer, settings, Runtime(seed=1, threads=1), Colours())
    found = tree_scores(model, [labelled(prompt)], seq_len=128)[0][0]
    np.testing.assert_allclose(found, vocabulary[words].numpy(), atol=1e-5)


def test_what_cannot_be_classified_is_said_in_one_line(tmp_path, tokenizer):
    class Alike(Colours):
        labels = ("late", "lately")

        def gold(self, facts):
            return "late"

    with pytest.raises(UserError, match="has no labels; derive it from Classification"):
        classified(tokenizer, tmp_path, domain=Domain())
    with pytest.raises(UserError, match="late and lately begin with the same token; take head: labels"):
        classified(tokenizer, tmp_path, domain=Alike(), head="words")
    with pytest.raises(UserError, match="has a head of other labels and writes no words"):
        classified(tokenizer, tmp_path, base=headed(tokenizer, ("reward",)), head="words")


def test_a_classifier_trains_on_where_its_labels_are_the_same(tmp_path, tokenizer):
    model, first = classified(tokenizer, tmp_path)
    weights = model.score.weight.detach().clone()
    method = load_method("classify", tmp_path)
    settings = method.settings.model_validate(SETTINGS)
    method.build(coloured(9, 1), model, tokenizer, settings, Runtime(seed=1, threads=1), Colours())
    assert torch.equal(model.score.weight, weights)
    _, second = classified(tokenizer, tmp_path, base=model)
    assert second.initial_loss < 0.5 * first.initial_loss
