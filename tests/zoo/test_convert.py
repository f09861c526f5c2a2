"""Folders of other libraries: the same numbers in, the same numbers out, and nothing ignored."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys

import pytest
import tokenizers as tokenizers_package
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import zoo
from zoo import checkpoint, cli, tokenizers
from zoo.decoding import generate
from zoo.errors import UserError

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 3e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "attn_implementation": "eager",
}  # fmt: skip


def randomise(model):
    """Weights that matter: norms away from one, logits of order one."""
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model.eval()


def llama(**changes):
    torch.manual_seed(0)
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes)))


def mistral(**changes):
    torch.manual_seed(1)
    settings = LLAMA | {"sliding_window": 7, "head_dim": 16}
    return randomise(transformers.MistralForCausalLM(transformers.MistralConfig(**settings | changes)))


def assert_same_logits(ours, theirs, length=37):
    tokens = torch.randint(ours.config.vocab_size, (2, length))
    with torch.no_grad():
        want, got = theirs(tokens).logits, ours(tokens)[0]
    scale = want.abs().max()
    assert scale > 0.5
    assert_close(got / scale, want / scale, rtol=1e-5, atol=1e-5)


CASES = {
    "grouped queries": llama,
    "one head each": lambda: llama(num_key_value_heads=4),
    "tied": lambda: llama(tie_word_embeddings=True),
    "window": mistral,
    "no window": lambda: mistral(sliding_window=None),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_there_and_back(case, tmp_path):
    theirs = CASES[case]()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.load(tmp_path / "theirs")
    assert (ours.name, ours.config.norm_eps, ours.config.rope_base) == ("transformer", 3e-6, 5e4)
    assert not ours.training
    for length in (1, 37):
        assert_same_logits(ours, theirs, length)
    checkpoint.export(ours, tmp_path / "back")
    kind = transformers.MistralForCausalLM if ours.config.window else transformers.LlamaForCausalLM
    again, report = kind.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, again.eval())
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    zoo.save(ours, tmp_path / "own")
    assert_same_logits(zoo.load(tmp_path / "own"), theirs)


@pytest.mark.parametrize("make", [llama, mistral])
def test_generation_token_by_token_is_theirs(make, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    ours = zoo.load(tmp_path)
    prompt = [5, 17, 3, 99, 42]
    got = list(generate(ours, prompt, max_tokens=64, temperature=0))
    want = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert got == want[0, len(prompt) :].tolist()
    assert len(set(got)) > 8  # not one token over and over


@pytest.mark.parametrize("old", [True, False])  # torch's files before 1.6 were no zip archives
def test_shards_an_index_and_a_pickle_hold_the_same(tmp_path, old):
    theirs = llama()
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    want = zoo.load(tmp_path / "parts")
    assert_same_logits(want, theirs)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tmp_path / "parts" / "config.json").read_text())
    state = theirs.state_dict()
    torch.save(state, tmp_path / "one" / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({n: t for n, t in state.items() if places[n] == file}, tmp_path / "two" / file)
    (tmp_path / "two" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for name in ("one", "two"):
        for key, value in zoo.load(tmp_path / name).state_dict().items():
            assert torch.equal(value, want.state_dict()[key]), key


# -- dtype, device, memory ---------------------------------------------------------------------------------------


def test_dtype_and_device(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in zoo.load(tmp_path).parameters()} == {torch.bfloat16}
    for dtype in (torch.float64, "float64"):
        assert {p.dtype for p in zoo.load(tmp_path, dtype=dtype).parameters()} == {torch.float64}
    assert {p.device.type for p in zoo.load(tmp_path, device="meta").parameters()} == {"meta"}
    with pytest.raises(
        UserError, match=r"no dtype 'bf16'; did you mean 'bfloat16'\? known are float32, bfloat16, float16, float64"
    ):
        zoo.load(tmp_path, dtype="bf16")


MEASURE = """
import ctypes, gc, os, resource, sys, zoo
def in_use():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
zoo.load(sys.argv[1])  # everything imported and run once
gc.collect()
for path in sys.argv[2:]:
    if os.fork() == 0:  # a process of its own for each, whose peak starts at what is in use now
        zoo.load(sys.argv[1])  # a fork starts without the pages of the libraries' code
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would be used again, and not be counted
        before = in_use()
        model = zoo.load(path)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(peak - before, sum(p.numel() * p.element_size() for p in model.parameters()), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.everything
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
def test_loading_needs_little_more_memory_than_the_weights(folder, tmp_path):
    """At most 1.2 times the weights at the peak, in a fresh process: ours, theirs, in shards, pickled."""
    sizes = {"d_model": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 8000, "hidden_size": 2048}
    with torch.device("meta"):
        model = zoo.create_model("transformer", **sizes)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    ours, theirs, parts, pickled = (tmp_path / name for name in ("ours", "theirs", "parts", "pickled"))
    zoo.save(model, ours)
    checkpoint.export(model, theirs)
    tensors = load_file(theirs / "model.safetensors")
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for path in (parts, pickled):
        path.mkdir()
        (path / "config.json").write_text((theirs / "config.json").read_text())
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save(tensors, pickled / "pytorch_model.bin")
    words = [str(path) for path in (folder, ours, theirs, parts, pickled)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, timeout=120, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    print([f"{peak / weights:.3f}" for peak, weights in measured])
    assert len(measured) == 4
    for kind, (peak, weights) in zip(("ours", "theirs", "parts", "pickled"), measured, strict=True):
        assert weights > 1.6e8
        assert 0.9 * weights < peak < 1.2 * weights, f"{kind}: {peak / weights:.3f}"


def test_a_loaded_model_does_not_lie_in_the_file(tmp_path):
    llama().save_pretrained(tmp_path)
    model = zoo.load(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (tmp_path / "model.safetensors").open("r+b") as file:  # overwritten in place, as by a copy
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_tensors_that_share_memory_in_a_pickle_are_parted(tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    state = theirs.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # one storage in the file, an untied model
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = zoo.load(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(model.embedding.weight, state["model.embed_tokens.weight"])


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    llama(num_hidden_layers=2).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "says rope_type = 'llama3', which zoo does not"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "says type = 'linear', which zoo does not implement"),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}, "fields that zoo does not know"),
        ("attention_bias", True, "says attention_bias = True, which zoo does not implement (only False)"),
        ("mlp_bias", True, "says mlp_bias = True"),
        ("hidden_act", "gelu", "says hidden_act = 'gelu'"),
        ("head_dim", "12", "'head_dim' in "),
        ("hidden_size", None, "must say 'hidden_size', and does not"),
        ("hidden_size", 0, "'hidden_size' in "),
        ("num_key_value_heads", 3, "holds a model that cannot be built here"),
        ("quantization_config", {"bits": 4}, "(quantization_config = {'bits': 4}); none is ignored"),
        ("model_type", "t5", "says model_type 't5', which zoo does not read; it reads gla, delta_net"),
        ("model_type", "gated_deltanett", "did you mean 'gated_deltanet'?"),
        ("model_type", "gla", "must say 'num_heads', and does not"),
        ("num_hidden_layers", 3, "9 tensors are missing (model.layers.2.input_layernorm.weight, "),
        ("num_hidden_layers", 1, "9 are unknown (model.layers.1.input_layernorm.weight, "),
        ("intermediate_size", 80, "is (48, 72) in the file and must be (48, 80)"),
        ("tie_word_embeddings", True, "must equal the tensor that it is tied to, and does not"),
    ],
)
def test_configs_that_are_refused(folder, field, value, sentence):
    edit(folder, **{field: value})
    with pytest.raises(UserError) as refused:
        zoo.load(folder)
    assert sentence in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", ["top level", "nowhere"])
def test_where_older_versions_put_the_rotary_base(folder, version):
    edit(folder, rope_parameters=None, **({"rope_theta": 7e3} if version == "top level" else {}))
    assert zoo.load(folder).config.rope_base == (7e3 if version == "top level" else 1e4)


def test_stored_frequencies_are_left_out_and_other_extras_are_not(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, path)
    zoo.load(folder)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, path)
    with pytest.raises(UserError, match=r"1 are unknown \(model.layers.0.self_attn.q_proj.bias\)"):
        zoo.load(folder)


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_with_code_is_refused_and_nothing_runs(folder, tmp_path, sharded, capsys):
    (folder / "model.safetensors").unlink()
    name = "pytorch_model.bin"
    if sharded:
        name = "pytorch_model-1.bin"
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    torch.save({"x": Payload(tmp_path / "proof")}, folder / name)
    assert cli.main(["convert", str(folder), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "holds objects other than tensors" in said
    assert "open" in said
    assert "nothing of it was run" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "out").exists()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "proof"), protocol=2))  # without torch's wrapping
    with pytest.raises(UserError, match="pytorch_model"):
        zoo.load(folder)
    assert not (tmp_path / "proof").exists()


def shards(folder):
    theirs = llama(num_hidden_layers=2)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="60KB")
    return sorted(folder.glob("*.safetensors"))


def lose(folder):
    shards(folder)[1].unlink()


def misplace(folder):
    first, second, *_ = shards(folder)
    tensors = load_file(first)
    moved = dict([tensors.popitem()])
    save_file(tensors, first)
    save_file(load_file(second) | moved, second)


def escape(folder):
    shards(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))


def scramble(folder):
    path = shards(folder)[0]
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)


def empty_index(folder):
    shards(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def other_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(3)], folder / "pytorch_model.bin")


def cut_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(3000)}, folder / "pytorch_model.bin")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose, "and 1 of them are not there (model-00002-of-"),
        (misplace, "which says otherwise; take another copy"),
        (escape, "names '../model-00001-of-"),
        (scramble, "model-00001-of-"),
        (empty_index, "has no weight_map"),
        (other_pickle, "must hold named tensors and nothing else"),
        (cut_pickle, "is damaged or cut short"),
    ],
)
def test_damaged_files_are_one_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(UserError) as refused:
        zoo.load(folder)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


# -- the command line --------------------------------------------------------------------------------------------


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture
def with_text(folder):
    """A tokenizer.json beside the weights."""
    words = {f"w{i}": i for i in range(100)} | {"</s>": 100}
    spec = tokenizers_package.Tokenizer(tokenizers_package.models.WordLevel(words, unk_token="w0"))
    spec.pre_tokenizer = tokenizers_package.pre_tokenizers.Whitespace()
    spec.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def test_convert_and_export(with_text, tmp_path, capsys):
    own, back = tmp_path / "own", tmp_path / "back"
    code, out, err = run(capsys, "convert", with_text, own, "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert (
        out == f"{own}: transformer, 44.5k parameters in bfloat16; tokenizer: tokenizer.json, tokenizer_config.json\n"
    )
    assert tokenizers.load(own).encode("w3 w7") == [3, 7]
    code, out, err = run(capsys, "generate", own, "--prompt", "w5", "--max-tokens", "3", "--temperature", "0")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"[w\d ]+\n", out)
    code, out, err = run(capsys, "export", own, back, "--to", "hf", "--dtype", "float32")
    assert (code, err) == (0, "")
    config = json.loads((back / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"], config["eos_token_id"]) == ("llama", "float32", 100)
    again = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    assert_same_logits(zoo.load(own, dtype="float32"), again)
    assert transformers.PreTrainedTokenizerFast(tokenizer_file=str(back / "tokenizer.json"))("w3 w7").input_ids == [
        3,
        7,
    ]


def test_refusals_of_the_command_line(folder, tmp_path, capsys):
    for words, code, sentence in (
        (("export", folder, tmp_path / "x", "--to", "onnx"), 2, "--to onnx does not exist yet; --to hf writes"),
        (("export", folder, tmp_path / "x"), 2, "the following arguments are required: --to"),
        (("convert", folder, tmp_path / "x", "--dtype", "int8"), 2, "no dtype 'int8'"),
        (("convert", folder, folder), 1, f"{folder} cannot be read and written at once; give another folder to write"),
        (("convert", tmp_path, tmp_path / "x"), 1, f"{tmp_path} is no checkpoint: it has no config.json"),
    ):
        got, _, said = run(capsys, *words)
        assert (got, said[: len(sentence) + 5]) == (code, f"zoo: {sentence}")
        assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("words", [["convert"], ["export", "--to", "hf"]])
def test_nothing_is_written_into_a_run_or_among_other_files(folder, tmp_path, capsys, words):
    model = zoo.load(folder)
    a_run = tmp_path / "run"
    zoo.save(model, a_run / "checkpoint")
    (a_run / "config.yaml").write_text("seed: 0\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    before = sorted(path for path in tmp_path.rglob("*"))
    verb, *options = words
    for source, place, sentence in (
        (a_run, a_run, "holds a run"),
        (a_run, a_run / "checkpoint", "cannot be read and written at once"),
        (folder, a_run, "holds a run"),
        (folder, full, "holds other files"),
        (folder, full / "thesis.tex", "is a file"),
    ):
        code, _, said = run(capsys, verb, source, place, *options)
        assert (code, said.count("\n"), sentence in said) == (1, 1, True), said
    assert sorted(path for path in tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert run(capsys, verb, a_run, tmp_path / "empty", *options)[0] == 0


def test_no_space_keeps_what_was_there(folder, tmp_path, capsys):
    kept, new = tmp_path / "kept", tmp_path / "new"
    small = zoo.create_model("gla", d_model=16, n_layers=1, n_heads=1, vocab_size=7, hidden_size=8)
    zoo.save(small, kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))  # no file may grow past this: as a full disk
    try:
        for write in (zoo.save, checkpoint.export):
            with pytest.raises(UserError) as refused:
                write(zoo.load(folder), kept)
            assert str(refused.value).startswith(f"no checkpoint could be written to {kept} (")
            assert str(refused.value).endswith("; the checkpoint that was there is kept")
        for words in (("convert", folder, new), ("export", folder, new, "--to", "hf")):
            code, _, said = run(capsys, *words)
            assert code == 1
            assert said.startswith(f"zoo: no checkpoint could be written to {new} (")
            assert said.endswith("; nothing was left behind\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert zoo.load(kept).name == "gla"


# -- the hub -----------------------------------------------------------------------------------------------------


def test_without_a_network_the_local_way_is_named(tmp_path, monkeypatch):
    """What the library raises when it must stay offline; nothing is asked of any network."""
    monkeypatch.chdir(tmp_path)

    def offline(name, **settings):
        return snapshot_download(name, **settings, cache_dir=tmp_path / "cache", local_files_only=True)

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    with pytest.raises(UserError) as refused:
        zoo.load("some/model")
    said = str(refused.value)
    assert said.startswith("no folder some/model here, and some/model cannot be had from the Hugging Face hub (")
    assert said.endswith("(hf download some/model --local-dir FOLDER) and give that folder")
    assert "\n" not in said
    assert ". " not in said
    with pytest.raises(UserError, match=r"^no folder some/mo del here, and 'some/mo del' is no name of the hub either"):
        zoo.load("some/mo del")


def test_a_hub_name_without_safetensors_falls_back_to_the_pickle(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    asked = []

    def snapshot(name, allow_patterns):
        asked.append([pattern for pattern in allow_patterns if "model" in pattern.split(".")[0]])
        if any("bin" in pattern for pattern in allow_patterns):
            torch.save(tensors, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    assert zoo.load("some/model").name == "transformer"
    assert asked == [["model*.safetensors"], ["pytorch_model*.bin"]]
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"some/model on the Hugging Face hub is no checkpoint: it has no config\.json"):
        zoo.load("some/model")
