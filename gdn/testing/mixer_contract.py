"""What every token mixer must satisfy, as a test class to inherit.

    class TestGatedDeltaNet(MixerContract):
        config = GatedDeltaNet.Config(heads=2, head_dim=16)

Runs on the CPU in float64 unless said otherwise, so that a failed equality is a fault and not rounding. `width`, `lengths` and
`tolerance` may be overridden where a mixer needs it.
"""

from __future__ import annotations

import io
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gdn.core.packing import Packing
from gdn.mixers.base import GrowingState, Mixer, MixerConfig, MixerState

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


class MixerContract:
    """Inherit, name a `config`, and pytest runs the contract."""

    config: ClassVar[MixerConfig]
    width: ClassVar[int] = 24
    length: ClassVar[int] = 75

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
        """The mixer with random weights, no bias or gate left at a special value."""
        torch.manual_seed(seed)
        mixer = self.config.build(self.width)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return mixer.to(dtype)

    def input(self, batch: int = 2, length: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length or self.length, self.width, generator=generator, dtype=torch.float64).to(dtype)

    def test_is_causal(self) -> None:
        mixer, x = self.build(), self.input()
        changed = x.clone()
        changed[:, self.length // 2 :] += 1
        y, z = mixer(x)[0], mixer(changed)[0]
        half = self.length // 2
        torch.testing.assert_close(y[:, :half], z[:, :half], **EXACT)
        assert not torch.allclose(y[:, half], z[:, half]), "the output at a token does not depend on that token"

    def test_any_split_of_the_sequence_gives_the_same_outputs_and_state(self) -> None:
        mixer, x = self.build(), self.input()
        whole, state = mixer(x, state=mixer.init_state(2))
        for cuts in ([1], [64], [3, 40], [70, 71, 72]):
            pieces, split = [], mixer.init_state(2)
            for piece in x.tensor_split(cuts, dim=1):
                y, split = mixer(piece, state=split)
                pieces.append(y)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
            self.same_state(split, state)

    def test_stepping_equals_the_parallel_form(self) -> None:
        mixer, x = self.build(), self.input(length=20)
        whole, end = mixer(x, state=mixer.init_state(2))
        for tokens in (1, 3):
            state, outputs = mixer.init_state(2), []
            with torch.no_grad():
                for piece in x.split(tokens, dim=1):
                    y, state = mixer(piece, state=state)
                    outputs.append(y)
            torch.testing.assert_close(torch.cat(outputs, dim=1), whole, **EXACT)
            self.same_state(state, end)

    def test_packed_documents_equal_separate_ones(self) -> None:
        mixer = self.build()
        lengths = [1, 30, 0, 2, 41, 1]
        x = self.input(batch=1, length=sum(lengths))
        packed = mixer(x, packing=Packing.from_lengths(lengths))[0]
        separate = [mixer(piece)[0] for piece in x.split(lengths, dim=1) if piece.shape[1]]
        torch.testing.assert_close(packed, torch.cat(separate, dim=1), **EXACT)
        rows = x.reshape(3, -1, self.width)
        bounds = sorted({0, 1, 31, 33, 74, 75} | {0, 25, 50, 75})
        folded = mixer(rows, packing=Packing.from_cu_seqlens(bounds))[0].reshape(1, -1, self.width)
        flat = mixer(x, packing=Packing.from_cu_seqlens(bounds))[0]
        torch.testing.assert_close(folded, flat, **EXACT)

    def test_padding_on_the_left_leaves_no_trace(self) -> None:
        mixer, x = self.build(), self.input(batch=1, length=40)
        for pads in (1, 5, 66):
            padded = torch.cat([7 * torch.ones(1, pads, self.width, dtype=x.dtype), x], dim=1)
            mask = torch.arange(pads + 40).unsqueeze(0) >= pads
            expected, end = mixer(x, state=mixer.init_state(1))
            y, state = mixer(padded, state=mixer.init_state(1), mask=mask)
            torch.testing.assert_close(y[:, pads:], expected, **EXACT)
            self.same_state(state, end)

    def test_padding_before_further_tokens_leaves_no_trace(self) -> None:
        """Sequences already begun, of which one goes on with fewer tokens than another in the batch."""
        mixer, x = self.build(), self.input(batch=1, length=40)
        for further, pads in ((0, 2), (1, 1), (3, 2), (2, 5), (31, 1), (31, 9)):
            padded = torch.cat([x[:, :9], 7 * torch.ones(1, pads, self.width, dtype=x.dtype), x[:, 9 : 9 + further]], dim=1)
            mask = torch.arange(pads + further).unsqueeze(0) >= pads
            with torch.no_grad():
                expected, end = mixer(x[:, : 9 + further], state=mixer.init_state(1))
                _, state = mixer(padded[:, :9], state=mixer.init_state(1))
                y, state = mixer(padded[:, 9:], state=state, mask=mask)
            torch.testing.assert_close(y[:, pads:], expected[:, 9:], **EXACT)
            self.same_state(state, end)

    def test_state_has_the_declared_size_which_is_fixed_unless_it_says_that_it_grows(self) -> None:
        mixer, x = self.build(torch.float32), self.input(3, 3 * self.length, torch.float32)
        state = mixer.init_state(3)
        addresses = [t.data_ptr() for t in state.tensors.values()]
        seen, sizes = 0, [state.nbytes]
        assert state.nbytes == 3 * self.config.state_bytes(self.width, 0)
        with torch.no_grad():
            for piece in x.split([1, 1, self.length, 1, 2 * self.length - 3], dim=1):
                seen += piece.shape[1]
                assert mixer(piece, state=state)[1] is state, "a state without gradient is updated in place"
                assert state.nbytes == 3 * self.config.state_bytes(self.width, seen), f"after {seen} tokens"
                sizes.append(state.nbytes)
        if self.config.state_grows:
            assert isinstance(state, GrowingState)
            assert sizes[-1] > sizes[0], "the config says that the state grows, and it does not"
            assert state.tokens == seen
        elif sizes[-1] < sizes[0]:
            assert sizes == sorted(sizes, reverse=True), "a state that lets go of a part may not grow in between"
        else:
            assert len(set(sizes)) == 1, "the state grows, and the config does not say so (state_grows)"
            assert addresses == [t.data_ptr() for t in state.tensors.values()], "a tensor of the state moved"

    def test_snapshots_roll_back_and_sequences_reorder_exactly(self) -> None:
        mixer, x = self.build(), self.input(3)
        with torch.no_grad():
            _, state = mixer(x, state=mixer.init_state(3))
            snapshot = state.clone()
            first = mixer(x[:, :5], state=state)[0]
            state.copy_(snapshot)
            assert torch.equal(mixer(x[:, :5], state=state)[0], first), "rolling back to a snapshot changed the outputs"
            order = torch.tensor([2, 0, 2])
            moved = mixer(x[order, :5], state=snapshot.select(order))[0]
        torch.testing.assert_close(moved, first[order], **EXACT)

    def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(self) -> None:
        mixer = self.build()
        (mixer(self.input())[0] ** 2).sum().backward()
        for name, parameter in mixer.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
            assert (parameter.grad != 0).any(), f"{name} has a zero gradient"

    def test_gradients_flow_through_the_state(self) -> None:
        mixer, x = self.build(), self.input()
        half = self.length // 2
        whole, split = x.clone().requires_grad_(), x.clone().requires_grad_()
        weight = self.input(seed=3)
        (mixer(whole)[0] * weight).sum().backward()
        y1, state = mixer(split[:, :half], state=mixer.init_state(2))
        y2, _ = mixer(split[:, half:], state=state)
        (torch.cat([y1, y2], dim=1) * weight).sum().backward()
        torch.testing.assert_close(split.grad, whole.grad, **EXACT)

    def test_bf16_stays_near_float64(self) -> None:
        """Under autocast, as trained. bf16 has 8 bits: each of the layer's roundings costs up to 2^-9 of its operand."""
        exact, x = self.build(), self.input()
        y = exact(x)[0]
        mixer = self.build(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            z = mixer(x.float())[0]
        assert z.dtype == torch.bfloat16
        error = (z.double() - y).norm() / y.norm()
        assert error < 0.03, f"relative error {error:.2g} in bf16"

    def test_compiles_as_one_graph(self) -> None:
        mixer, x = self.build(torch.float32), self.input(dtype=torch.float32)
        packing = Packing.from_lengths([20, 55, 75])
        torch._dynamo.reset()  # all mixers compile this one function, and there is a limit to how often

        def loss(x: Tensor) -> Tensor:
            return (mixer(x)[0] ** 2).sum() + (mixer(x, packing=packing)[0] ** 2).sum()

        eager = torch.autograd.grad(loss(x), list(mixer.parameters()))
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), list(mixer.parameters()))
        for (name, _), a, b in zip(mixer.named_parameters(), eager, compiled, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    def test_builds_without_memory_and_declares_its_parameters(self) -> None:
        with torch.device("meta"):
            mixer = self.config.build(self.width)
        assert all(p.is_meta for p in mixer.parameters())
        assert sum(p.numel() for p in mixer.parameters()) == self.config.num_parameters(self.width)

    def test_declares_its_operations(self) -> None:
        """At least two per weight of every matrix; at most those plus eight for each byte of the declared state."""
        mixer = self.build()
        matrices = 2 * sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear))
        declared = self.config.flops_per_token(self.width, 1)
        rest = 2 * sum(p.numel() for p in mixer.parameters()) - matrices + 8 * self.config.state_bytes(self.width, 1)
        assert matrices <= declared <= matrices + rest

    def test_config_and_weights_round_trip(self) -> None:
        assert MixerConfig.from_dict(self.config.to_dict()) == self.config
        mixer, x = self.build(), self.input()
        file = io.BytesIO()
        torch.save(mixer.state_dict(), file)
        file.seek(0)
        other = MixerConfig.from_dict(self.config.to_dict()).build(self.width).double()
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(x)[0], mixer(x)[0])

    def test_learns_to_recall_a_token(self) -> None:
        """A toy task: the sequence holds a marked token; at its end, say which it was. Training ends when that is learnt."""
        torch.manual_seed(0)
        symbols, length = 4, 12
        embedding, head = nn.Embedding(2 * symbols, self.width), nn.Linear(self.width, symbols)
        mixer = self.config.build(self.width)
        parameters = [*embedding.parameters(), *mixer.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        chance, losses = math.log(symbols), []
        while len(losses) < 5 or sum(losses[-5:]) / 5 > chance / 4:
            assert len(losses) < 120, f"loss {losses[-1]:.2f} after 120 steps, chance {chance:.2f}"
            tokens = torch.randint(symbols, (32, length))
            answer, place = torch.randint(symbols, (32,)), torch.randint(length - 1, (32,))
            tokens[torch.arange(32), place] = symbols + answer
            x = embedding(tokens)
            logits = head((x + mixer(x)[0])[:, -1])
            loss = nn.functional.cross_entropy(logits, answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    def same_state(self, actual: MixerState | None, expected: MixerState | None) -> None:
        assert actual is not None
        assert expected is not None
        assert list(actual) == list(expected)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], **EXACT, msg=lambda m, name=name: f"state {name}: {m}")
