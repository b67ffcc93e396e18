import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from ldm.errors import BadSampleError, UserError
from ldm.text import TextEncoder, load_text_encoder, stored_embedding
from tests.tiny_text import (
    CLIP_MAX_TOKENS,
    T5_MAX_TOKENS,
    WIDTH,
    clip_config,
    clip_tokenizer,
    save_clip,
    save_random,
    save_t5,
    t5_config,
    t5_tokenizer,
)

WEIGHTS = "model.safetensors"
LONG = "the cat " * 500
TEXTS = [
    "the cat",
    "",
    "a dog on the beach",
    "日本の猫",
    "🐱🏽 e\u0301 \x00",
    LONG,
    "  two  spaces ",
    "the dog",
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> TextEncoder:
    return load_text_encoder(str(clip_folder))


@pytest.fixture(scope="module")
def t5(t5_folder: Path) -> TextEncoder:
    return load_text_encoder(str(t5_folder))


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(clip_folder, tmp_path / "clip"))


def refusal(source: str | Path, **options: int) -> str:
    with pytest.raises(UserError) as caught:
        load_text_encoder(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_clip_gives_the_first_rows_of_the_usual_padded_encoding(clip: TextEncoder, clip_folder: Path) -> None:
    # CLIP is causal: what pads a text to 77 tokens comes after it and changes nothing in it.
    reference, tokenizer = (
        CLIPTextModel.from_pretrained(clip_folder),
        AutoTokenizer.from_pretrained(clip_folder),
    )
    padded = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    hidden = reference(padded.input_ids).last_hidden_state
    assert hidden.shape == (len(TEXTS), CLIP_MAX_TOKENS, WIDTH)
    for embedding, row, length in zip(clip.encode(TEXTS), hidden, padded.attention_mask.sum(1), strict=True):
        assert embedding.shape == (length, WIDTH) and embedding.dtype == np.float16
        np.testing.assert_allclose(embedding, row[:length].numpy(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_t5_gives_the_unmasked_rows_of_the_usual_padded_encoding(t5: TextEncoder, t5_folder: Path) -> None:
    reference, tokenizer = T5EncoderModel.from_pretrained(t5_folder), AutoTokenizer.from_pretrained(t5_folder)
    padded = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    hidden = reference(**padded).last_hidden_state
    assert hidden.shape == (len(TEXTS), T5_MAX_TOKENS, WIDTH)
    for embedding, row, mask in zip(t5.encode(TEXTS), hidden, padded.attention_mask, strict=True):
        np.testing.assert_allclose(embedding, row[mask.bool()].numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_text_does_not_depend_on_its_batch(name: str, request: pytest.FixtureRequest) -> None:
    encoder: TextEncoder = request.getfixturevalue(name)
    alone = [encoder.encode([text])[0] for text in TEXTS]
    lengths = [len(embedding) for embedding in alone]
    assert len(set(lengths)) > 4
    assert same(encoder.encode(TEXTS), alone)
    assert same(encoder.encode(TEXTS[::-1])[::-1], alone)
    assert same(encoder.encode(TEXTS, micro_batch=1), alone)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_eight_texts_of_one_length_are_those_alone_to_rounding(
    name: str, request: pytest.FixtureRequest
) -> None:
    encoder: TextEncoder = request.getfixturevalue(name)
    texts = [f"the {letter}" for letter in "abcdefgh"]
    hidden = encoder.embed([encoder.tokenise(text) for text in texts])
    for text, together in zip(texts, hidden, strict=True):
        (alone,) = encoder.embed([encoder.tokenise(text)])
        # Another number of rows may be another order of sums in a matrix product.
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_no_text_and_texts_beyond_the_micro_batch(clip: TextEncoder) -> None:
    assert clip.encode([]) == []
    texts = [f"{a}{b}" for a in "abc" for b in "def"]
    assert [e.shape for e in clip.encode(texts, micro_batch=4)] == [(4, WIDTH)] * 9


def test_the_empty_text_is_what_opens_and_closes_a_text(clip: TextEncoder, t5: TextEncoder) -> None:
    assert clip.tokenise("").ids == (clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id)
    assert t5.tokenise("").ids == (t5.tokenizer.eos_token_id,)


def test_a_long_text_is_cut_and_still_closed(clip: TextEncoder, t5: TextEncoder) -> None:
    for encoder, most in ((clip, CLIP_MAX_TOKENS), (t5, T5_MAX_TOKENS)):
        tokens = encoder.tokenise(LONG)
        assert encoder.max_tokens == len(tokens.ids) == most
        assert tokens.is_truncated and tokens.ids[-1] == encoder.tokenizer.eos_token_id


def test_a_text_of_just_the_most_tokens_is_whole(clip_folder: Path) -> None:
    clip = load_text_encoder(str(clip_folder), max_tokens=5)
    assert [len(clip.tokenise(text).ids) for text in ("abc", "abcd")] == [5, 5]
    assert [clip.tokenise(text).is_truncated for text in ("abc", "abcd")] == [False, True]


def test_a_layer_is_that_of_transformers(clip_folder: Path, clip: TextEncoder) -> None:
    reference = CLIPTextModel.from_pretrained(clip_folder)
    ids = torch.tensor([clip.tokenise("the cat").ids])
    with torch.no_grad():
        states = reference(ids, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for layer in (0, -2, 2, -1):
        encoder = load_text_encoder(str(clip_folder), layer=layer)
        assert np.array_equal(encoder.encode(["the cat"])[0], states[layer][0].half().numpy())


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_told(clip_folder: Path, layer: int) -> None:
    assert f"has no layer {layer}; allowed: -4 to 3, or none" in refusal(clip_folder, layer=layer)


@pytest.mark.parametrize("max_tokens", [2, 78])
def test_a_cut_that_does_not_fit_is_told(clip_folder: Path, max_tokens: int) -> None:
    message = refusal(clip_folder, max_tokens=max_tokens)
    assert f"cannot take max_tokens = {max_tokens}; allowed: 3 to {CLIP_MAX_TOKENS}" in message


def test_a_model_without_a_stated_maximum_needs_one(tmp_path: Path) -> None:
    folder = save_t5(tmp_path, max_tokens=None)
    assert "states no maximum of tokens; set max_tokens" in refusal(folder)
    assert len(load_text_encoder(str(folder), max_tokens=300).encode([LONG])[0]) == 300


def test_a_projection_changes_no_hidden_state(tmp_path: Path, clip: TextEncoder) -> None:
    save_clip(tmp_path, with_projection=True)
    assert "text_projection.weight" in load_file(tmp_path / WEIGHTS)
    bare = clip.model.state_dict()
    save_file(
        {f"text_model.{k}": v for k, v in bare.items()} | {"text_projection.weight": torch.zeros(8, WIDTH)},
        tmp_path / WEIGHTS,
        metadata={"format": "pt"},
    )
    assert same(load_text_encoder(str(tmp_path)).encode(TEXTS), clip.encode(TEXTS))


@torch.no_grad()
def test_a_whole_clip_and_a_whole_t5_stand_for_their_text_encoders(tmp_path: Path) -> None:
    text, vision = clip_config().to_dict(), {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 1, "image_size": 4, "patch_size": 2}
    config = CLIPConfig(text_config=text, vision_config=vision | sizes, projection_dim=8)
    whole = save_random(CLIPModel, config, tmp_path / "clip", seed=3)
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path / "clip")
    expected = whole.text_model(torch.tensor([tokenizer("the cat").input_ids])).last_hidden_state[0]
    found = load_text_encoder(str(tmp_path / "clip")).encode(["the cat"])[0]
    assert np.array_equal(found, expected.half().numpy())

    whole = save_random(T5ForConditionalGeneration, t5_config(), tmp_path / "t5", seed=3)
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(tmp_path / "t5")
    expected = whole.encoder(torch.tensor([tokenizer("the cat").input_ids])).last_hidden_state[0]
    found = load_text_encoder(str(tmp_path / "t5")).encode(["the cat"])[0]
    assert np.array_equal(found, expected.half().numpy())


def test_a_bert_without_a_pooler_is_a_text_encoder_too(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    config = BertConfig(
        vocab_size=7,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=12,
    )
    model = save_random(BertModel, config, tmp_path, seed=0)
    tokenizer.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, remove="pooler.dense.weight")
    encoder, again = load_text_encoder(str(tmp_path)), load_text_encoder(str(tmp_path))
    assert encoder.fingerprint == again.fingerprint
    assert encoder.max_tokens == 12
    assert encoder.tokenise("the cat").ids == (2, 5, 6, 3)
    with torch.no_grad():
        expected = model(torch.tensor([[2, 5, 6, 3]])).last_hidden_state[0]
    assert np.array_equal(encoder.encode(["the cat"])[0], expected.half().numpy())


def rewrite_weights(folder: Path, *, remove: str = "", nudge: str = "") -> None:
    weights = load_file(folder / WEIGHTS)
    if remove:
        del weights[remove]
    if nudge:
        flat = weights[nudge].view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_folders_as_diffusers_lays_them_out(clip_folder: Path, t5_folder: Path, tmp_path: Path) -> None:
    for number, folder in (("", clip_folder), ("_2", t5_folder)):
        for part, is_tokenizer in ((f"text_encoder{number}", False), (f"tokenizer{number}", True)):
            (tmp_path / part).mkdir()
            for file in folder.iterdir():
                if (file.name in ("config.json", WEIGHTS)) != is_tokenizer:
                    shutil.copy(file, tmp_path / part)
    clip, t5 = load_text_encoder(str(clip_folder)), load_text_encoder(str(t5_folder))
    assert load_text_encoder(str(tmp_path)).fingerprint == clip.fingerprint
    assert load_text_encoder(str(tmp_path / "text_encoder")).fingerprint == clip.fingerprint
    assert load_text_encoder(str(tmp_path / "text_encoder_2")).fingerprint == t5.fingerprint


def test_half_precision_files_alone_are_loaded_as_fp32(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    encoder = load_text_encoder(str(folder))
    assert {tensor.dtype for tensor in encoder.model.state_dict().values()} == {torch.float32}


def test_sharded_weights_are_put_together(clip: TextEncoder, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    clip.model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert load_text_encoder(str(folder)).fingerprint == clip.fingerprint


def test_loading_writes_nothing_to_the_terminal(
    clip_folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with_more = save_clip(tmp_path, with_projection=True)
    capfd.readouterr()
    load_text_encoder(str(with_more)).encode([LONG])
    assert capfd.readouterr() == ("", "")


def test_fp16_keeps_what_the_model_needs_in_fp32(t5_folder: Path) -> None:
    half = load_text_encoder(str(t5_folder)).to("cpu", torch.float16)
    kept = {name for name, tensor in half.model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in (0, 1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_is_near(t5_folder: Path, t5: TextEncoder, dtype: torch.dtype) -> None:
    low = load_text_encoder(str(t5_folder)).to("cpu", dtype)
    for ours, exact in zip(low.encode(TEXTS), t5.encode(TEXTS), strict=True):
        error = np.abs(ours.astype(np.float32) - exact.astype(np.float32)).max()
        assert 0 < error < 20 * torch.finfo(dtype).eps * np.abs(exact).max()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nan, "non_finite_embedding"),
        (-torch.inf, "non_finite_embedding"),
        (-70000.0, "embedding_overflow"),
    ],
)
def test_what_fp16_cannot_hold_is_refused(value: float, reason: str) -> None:
    hidden = torch.zeros(3, 4)
    hidden[1, 2] = value
    with pytest.raises(BadSampleError) as caught:
        stored_embedding(hidden)
    assert caught.value.reason == reason


def test_the_largest_fp16_value_is_stored() -> None:
    assert stored_embedding(torch.tensor([[65504.0, -65504.0]])).tolist() == [[65504.0, -65504.0]]


def test_broken_unicode_is_refused(clip: TextEncoder) -> None:
    with pytest.raises(BadSampleError, match="bad_caption: surrogates not allowed at character 2"):
        clip.encode(["fine", json.loads('"a \\ud83d"')])


def test_the_fingerprint_is_that_of_the_function(clip_folder: Path, folder: Path) -> None:
    first = load_text_encoder(str(clip_folder)).fingerprint
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "4.0.0", "_name_or_path": "elsewhere", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("a copy")
    assert load_text_encoder(str(folder)).fingerprint == first
    assert load_text_encoder(str(folder), max_tokens=CLIP_MAX_TOKENS).fingerprint == first
    assert len(first) == 64
    by_options = [{"layer": -2}, {"layer": 2}, {"layer": -1}, {"max_tokens": 20}]
    prints = [load_text_encoder(str(folder), **options).fingerprint for options in by_options]
    assert prints[0] == prints[1]
    assert len({first, *prints}) == 4


@pytest.mark.parametrize("change", ["weight", "config", "tokenizer"])
def test_a_small_change_changes_the_fingerprint(clip: TextEncoder, folder: Path, change: str) -> None:
    if change == "weight":
        rewrite_weights(folder, nudge="final_layer_norm.bias")
    elif change == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    else:
        content = json.loads((folder / "tokenizer.json").read_text())
        words = content["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    changed = load_text_encoder(str(folder))
    assert changed.fingerprint != clip.fingerprint


@pytest.mark.parametrize("source", ["/nowhere/clip", "./nowhere", "nowhere", "some/where/else", "a b/c"])
def test_a_missing_folder_is_told(source: str) -> None:
    assert f"no text encoder at {source!r}; allowed: a folder" in refusal(source)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("config.json", "has no config.json"),
        (WEIGHTS, "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_missing_file_is_told(folder: Path, file: str, told: str) -> None:
    (folder / file).unlink()
    (folder / "tokenizer_config.json").unlink()
    assert told in refusal(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "pickle files are refused" in refusal(folder)


def test_code_that_comes_with_a_model_is_not_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nEvil = None\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot load text encoder" in refusal(folder)
    assert not ran.exists()


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "nothing"}'])
def test_a_damaged_config_is_told(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    assert "cannot load text encoder" in refusal(folder)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"hidden_size": "wide"}, {"num_attention_heads": 3}])
def test_a_config_that_does_not_fit_is_told(folder: Path, change: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert "cannot load text encoder" in refusal(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 5000])
@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json"])
def test_a_cut_off_file_is_told(folder: Path, file: str, num_bytes: int) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:num_bytes])
    assert "cannot load t" in refusal(folder)


def test_a_missing_weight_is_told(folder: Path) -> None:
    rewrite_weights(folder, remove="final_layer_norm.bias")
    assert "do not fit its config.json: 1 are missing, such as final_layer_norm.bias" in refusal(folder)


def test_models_that_encode_no_text_are_told(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    save_random(ViTModel, ViTConfig(image_size=4, patch_size=2, **sizes), tmp_path / "vit", seed=0)
    small = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 600}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    save_random(BartModel, BartConfig(**small, **heads), tmp_path / "bart", seed=0)
    for name in ("vit", "bart"):
        clip_tokenizer().save_pretrained(tmp_path / name)
    assert "is a ViTModel, which reads no text" in refusal(tmp_path / "vit")
    assert "is a bart, which is no text encoder; allowed: CLIP's" in refusal(tmp_path / "bart")


def test_a_hub_that_is_switched_off_is_told() -> None:
    message = refusal("nobody-at-all/no-such-clip")
    assert "the model hub cannot be reached for text encoder 'nobody-at-all/no-such-clip'" in message
    assert "give a local folder in transformers' format" in message


def test_a_missing_transformers_is_told(clip_folder: Path) -> None:
    run = (
        "import sys; sys.modules['transformers'] = None\n"
        "from ldm.errors import UserError\nfrom ldm.text import load_text_encoder\n"
        f"try: load_text_encoder({str(clip_folder)!r})\nexcept UserError as error: print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", run], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout == ("text encoders need the package transformers; pip install 'ray-ldm[text]'\n"), (
        done.stderr
    )
