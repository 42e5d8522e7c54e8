"""A state one can hold: forks, rollback, files of one model, other precisions."""

from __future__ import annotations

from pathlib import Path

import fresh
import pytest
import torch

from gdn.cli import main
from gdn.core.errors import ArgumentError, CheckpointError
from gdn.data.tokenizer import ByteTokenizer
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.gsa import GSA
from gdn.models.lm import LM
from gdn.models.precision import memories
from gdn.models.sampling import Sampling, generate, prefill, resume
from gdn.models.state import LMState, fingerprint
from gdn.models.store import save_model

LINEAR = GatedDeltaNet.Config(heads=2, head_dim=8)
PURE = LM.Config(vocab=17, width=24, layers=2, mlp=32, pattern=(LINEAR,))
HYBRID = PURE.with_(layers=3, pattern=(LINEAR, Attention.Config(heads=2, head_dim=8), Attention.Config(heads=2, head_dim=8, window=5)))


def build(config: LM.Config = PURE, seed: int = 0, dtype: torch.dtype = torch.float32) -> LM:
    torch.manual_seed(seed)
    return LM(config).to(dtype).eval()


def tokens(batch: int = 2, length: int = 50) -> torch.Tensor:
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(5))


def read(model: LM, x: torch.Tensor, state: LMState) -> LMState:
    with torch.no_grad():
        after = model(x, state=state).state
    assert after is not None
    return after


def same(a: LMState, b: LMState) -> None:
    assert a.length == b.length
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert list(mine) == list(theirs)
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("config", [PURE, HYBRID], ids=["pure", "hybrid"])
@pytest.mark.parametrize("window", [3, 64])
def test_tokens_read_one_by_one_are_taken_back_bit_for_bit(config: LM.Config, window: int) -> None:
    model, x = build(config), tokens()
    state = read(model, x[:, :20], model.init_state(2)).record(window)
    before = []
    for i in range(20, 32):
        before.append(state.clone())
        state = read(model, x[:, i : i + 1], state)
    for back in (1, 2):
        state.rollback(back)
        same(state, before[12 - (1 if back == 1 else 3)])
    with pytest.raises(ArgumentError, match="expected 0 to"):
        state.rollback(13)
    state.forget()
    with pytest.raises(ArgumentError, match=r"record\(\)"):
        state.rollback(1)


def test_a_window_bounds_what_is_kept_and_a_long_piece_is_cut() -> None:
    model, x = build(dtype=torch.float64), tokens(1, 50)
    state = model.init_state(1).record(4)
    whole, pieces = model.init_state(1), [30, 1, 1, 3, 10]
    for piece in x[:, :45].split(pieces, dim=1):
        state, whole = read(model, piece, state), read(model, piece, whole)
        assert 4 <= state.layers[0].past.length < 8
    for mine, theirs in zip(state.layers, whole.layers):
        torch.testing.assert_close(mine["memory"], theirs["memory"])
    fresh = read(model, x[:, :41], model.init_state(1))
    for mine, theirs in zip(state.rollback(4).layers, fresh.layers):
        torch.testing.assert_close(mine["memory"], theirs["memory"])


@pytest.mark.parametrize("config", [PURE, HYBRID], ids=["pure", "hybrid"])
def test_a_fork_is_its_own_and_keeps_its_past(config: LM.Config) -> None:
    model, x = build(config), tokens()
    state = read(model, x[:, :20], model.init_state(2).record())
    kept = state.clone()
    fork = read(model, x[:, 20:25], state.fork())
    same(state, kept)
    assert fork.nbytes >= state.nbytes == kept.nbytes
    fork.rollback(5)
    same(fork, kept)
    fork.rollback(2)
    state.rollback(2)
    same(fork, state)


@pytest.mark.parametrize("config", [PURE, HYBRID], ids=["pure", "hybrid"])
def test_a_state_that_returned_to_a_snapshot_takes_back_the_tokens_of_that(config: LM.Config) -> None:
    model, x = build(config), tokens()
    before = model.init_state(2)
    state = read(model, x[:, :10], before.clone().record())
    snapshot = state.clone()
    for _ in range(2):
        state = read(model, x[:, 10:15], state)
        state.copy_(snapshot)
        state.rollback(2)
        same(state, snapshot.fork().rollback(2))
    state.copy_(before)
    with pytest.raises(ArgumentError, match=r"record\(\)"):
        state.rollback(1)


@pytest.mark.parametrize("config", [PURE, HYBRID], ids=["pure", "hybrid"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_gives_the_state_back_and_only_to_its_model(tmp_path: Path, config: LM.Config, precision: str) -> None:
    model, x = build(config), tokens()
    prompt, state = resume(model, x, model.init_state(2).to(precision))
    state.save(tmp_path / "state.safetensors")
    again = LMState.load(tmp_path / "state.safetensors", build(config))
    same(again, state)
    assert torch.equal(again.pending, x[:, -1:])
    streams = [generate(model, prompt, Sampling(), state=s) for s in (state, again)]
    for _ in range(10):
        assert torch.equal(*(next(s) for s in streams))
    for other in (build(config, seed=1), build(config, dtype=torch.bfloat16), build(config.with_(norm_eps=1e-6))):
        with pytest.raises(CheckpointError, match="belongs to another model"):
            LMState.load(tmp_path / "state.safetensors", other)
    trained = build(config)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)
    trained(x, targets=x).loss.backward()
    optimizer.step()
    assert fingerprint(trained) != fingerprint(model) == fingerprint(build(config))


def test_tokens_that_are_still_to_be_read_go_along() -> None:
    model, x, question = build(), tokens(2, 12), tokens(2, 15)[:, 12:]
    whole = model(torch.cat([x, question], dim=1)).logits[:, -1]

    def answers(state: LMState, question: torch.Tensor) -> torch.Tensor:
        return prefill(model, *resume(model, question, state))

    _, state = resume(model, x)
    snapshot, order = state.clone(), torch.tensor([1, 0, 1])
    torch.testing.assert_close(answers(state.select(order), question[order]), whole[order])
    torch.testing.assert_close(answers(state, question), whole)
    state.copy_(snapshot)
    torch.testing.assert_close(answers(state, question), whole)
    assert snapshot.to("meta").pending.is_meta
    _, state = resume(model, x, model.init_state(2).record())
    torch.testing.assert_close(answers(state.fork().rollback(0), question), whole)
    torch.testing.assert_close(answers(state.rollback(1), x[:, 10:]), model(x).logits[:, -1])


@pytest.mark.parametrize("gradient", [False, True])
def test_whichever_handle_is_held_knows_what_was_read(tmp_path: Path, gradient: bool) -> None:
    model, x = build(), tokens(1, 20)
    with torch.set_grad_enabled(gradient):
        first = model(x[:, :12], state=model.init_state(1)).state
        after = model(x[:, 12:], state=first).state
    assert after.length == 20
    assert first.length == (12 if gradient else 20)  # where gradients flow the first is as it was
    right = read(model, x[:, : first.length], model.init_state(1))
    for mine, theirs in zip(first.layers, right.layers, strict=True):
        torch.testing.assert_close(mine.tensors, theirs.tensors)


def test_a_text_cannot_go_on_past_what_is_still_to_be_read() -> None:
    model, x, question = build(), tokens(2, 12), tokens(2, 15)[:, 12:]
    whole = torch.cat([x, question], dim=1)
    _, state = resume(model, x)
    for wrong in (question, question[:, :0], model.embedding(whole[:, 11:])):
        with pytest.raises(ArgumentError, match=r"1 token.* not been read"):
            model(wrong, state=state)
    with pytest.raises(ArgumentError, match=r"state\.pending"):
        next(generate(model, question, state=state))
    found = model(torch.cat([state.pending, question], dim=1), state=state)
    torch.testing.assert_close(found.logits[:, -1], model(whole).logits[:, -1])
    assert state.pending is None and found.state.pending is None
    model(question, state=found.state)


@pytest.mark.parametrize("config", [PURE, HYBRID], ids=["pure", "hybrid"])
def test_a_state_of_fixed_addresses_goes_on_from_a_file_and_from_a_copy(tmp_path: Path, config: LM.Config) -> None:
    model, x = build(config, dtype=torch.float64), tokens()
    state = read(model, x[:, :20], model.init_state(2, room=30))
    state.save(tmp_path / "state")
    copied = model.init_state(2, room=30)
    state.pending = x[:, 20:21]
    copied.copy_(state)
    assert copied.pending is state.pending
    same(read(model, x[:, 20:27], LMState.load(tmp_path / "state", model)), read(model, x[:, 20:27], copied))
    with torch.no_grad():
        expected = model(x[:, :30]).logits[:, -3:]
        torch.testing.assert_close(model(x[:, 27:30], state=copied).logits, expected, rtol=1e-9, atol=1e-10)


def test_wrong_files_and_targets_are_named(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(CheckpointError, match="no such file"):
        LMState.load(tmp_path / "none", model)
    (tmp_path / "text").write_text("hello, this is no state at all")
    with pytest.raises(CheckpointError, match="not a state file"):
        LMState.load(tmp_path / "text", model)
    save_model(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a file of the format gdn.state"):
        LMState.load(tmp_path / "model.safetensors", model)
    with pytest.raises(ArgumentError, match="expected a device, fp32, bf16, fp16, int8 or fp8, got 'int4'"):
        model.init_state(1).to("int4")
    with pytest.raises(ArgumentError, match="belongs to no model"):
        LMState([]).save(tmp_path / "x")


@pytest.mark.parametrize(
    ("width", "mixer", "names"),
    [(24, LINEAR.with_(head_dim=16), ["memory"]), (32, GSA.Config(heads=2, slots=16), ["memory_keys", "memory_values"])],
    ids=["delta rule", "slots"],
)
def test_precisions_take_fewer_bytes_and_cost_what_they_should(width: int, mixer: MixerConfig, names: list[str]) -> None:
    model, x = build(PURE.with_(width=width, pattern=(mixer,))), tokens(2, 120)
    exact = read(model, x, model.init_state(2))
    assert exact.to("fp32").nbytes == exact.nbytes
    assert [memories(layer) for layer in exact.layers] == [names] * len(exact.layers)
    kept = [layer[name] for layer in exact.layers for name in names]
    heads = sum(t[..., 0, 0].numel() for t in kept)
    rows, numbers = sum(t[..., 0].numel() for t in kept), sum(t.numel() for t in kept)
    sizes = {"bf16": 2 * numbers, "fp16": 2 * numbers, "int8": numbers + 4 * rows, "fp8": numbers + 4 * heads}
    for precision, error in (("bf16", 0.02), ("fp16", 0.003), ("int8", 0.02), ("fp8", 0.06)):
        state = model.init_state(2).to(precision)
        for piece in x.split(10, dim=1):
            state = read(model, piece, state)
        assert exact.nbytes - state.nbytes == 4 * numbers - sizes[precision]
        for mine, theirs in zip(state.to("fp32").layers, exact.layers):
            for name in names:
                wrong = (mine[name] - theirs[name]).norm() / theirs[name].norm()
                assert error / 20 < wrong < error, (precision, name, wrong)
        branch = read(model, x[[1, 1, 0], :3], state.select(torch.tensor([1, 1, 0])).record())
        assert branch.batch == 3
        snapshot = branch.clone()
        same(read(model, x[[1, 1, 0], :1], branch).rollback(1), snapshot)


def test_another_process_goes_on_with_the_same_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = build(HYBRID.with_(vocab=ByteTokenizer().vocab_size))
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    save_model(model, tmp_path)
    ByteTokenizer().save(tmp_path)
    command = ["generate", str(tmp_path), "--device", "cpu", "--tokens", "12"]
    document, file = "a long document", str(tmp_path / "state")
    assert main([*command, "--prompt", document, "--save-state", file]) == 0
    here = capfd.readouterr().out
    assert here.startswith(document)
    assert len(here) > len(document) + 3
    assert fresh.run(main, [*command, "--load-state", file]) == fresh.Ended(0, here[len(document) :])


@pytest.mark.parametrize("room", [None, 60])
def test_quantised_projections_read_into_a_state_of_the_activations_dtype(room: int | None) -> None:
    class Bytes(torch.nn.Linear):
        """As bitsandbytes stores a layer: the weight is bytes, the output is of the input's dtype."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)

    model, x = build(HYBRID.with_(layers=2)), tokens()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear):
                quantised = Bytes(layer.in_features, layer.out_features, bias=layer.bias is not None)
                quantised.weight = torch.nn.Parameter((layer.weight * 64).round().to(torch.int8), requires_grad=False)
                setattr(module, name, quantised)
    with torch.no_grad():
        whole, state = model(x).logits, read(model, x[:, :30], model.init_state(2, room=room))
        torch.testing.assert_close(model(x[:, 30:], state=state).logits, whole[:, 30:], atol=1e-5, rtol=1e-4)


def test_a_full_disk_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*s\.state: .*No space left"):
        build().init_state(1).save(tmp_path / "s.state")
    assert not list(tmp_path.iterdir())
