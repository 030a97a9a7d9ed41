"""AST's flow and student against stored outputs, Jacobians, inverses and hand values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from golden import Golden, filled_state, learned, noise, parameters
from polyspect.errors import ConfigError, ShapeError, WeightsError
from polyspect.layers.flow import (
    ConvStudent,
    Coupling,
    Flow,
    channel_permutation,
    imitation_loss,
    likelihood_loss,
    positional_encoding,
)
from polyspect.weights.patch_networks import conv_student_state, flow_state
from published_networks import ast_student, ast_teacher

MODES = {"combi": 368, "rgb": 304}


def disturbed(net: torch.nn.Module) -> torch.nn.Module:
    """Weights of no particular kind."""
    for name, parameter in net.named_parameters():
        size = 1.0 if name.endswith("gain") else 0.15
        parameter.data = size * noise(name, *parameter.shape).to(parameter.dtype)
    return net


def prefixed(start: str, shapes):
    return {name.removeprefix(start): t for name, t in filled_state({start + n: s for n, s in shapes.items()}).items()}


# -- stored outputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["combi", pytest.param("rgb", marks=pytest.mark.slow)])
def test_equals_the_official_code(mode):
    golden, channels = Golden(f"ast_{mode}.npz"), MODES[mode]
    with torch.device("meta"):
        student = ConvStudent(channels).eval()
    teacher = Flow(channels)
    teacher.load_state_dict(flow_state(prefixed("teacher.", ast_teacher(channels)), teacher))
    student.load_state_dict(conv_student_state(prefixed("student.", ast_student(channels)), student), assign=True)
    golden.check("pos_enc", positional_encoding(32, 6, 6)[None], 1e-6)
    for index, order in enumerate(golden.tensor("perms")):
        assert torch.equal(teacher.get_buffer(f"order{index}"), order)
    x, weight = noise("features", 2, 304, 6, 6), None
    if mode == "combi":
        x = torch.cat([x, F.pixel_unshuffle(golden.tensor("depth"), 8)], dim=1)
        weight = golden.tensor("fg_down")[:, 0]
    with torch.no_grad():
        (z, log_det), imitated = teacher(x), student(x)
    golden.check("z_teacher", z, 1e-4, 1e-4)
    golden.check("log_det", log_det, 1e-4, 1e-4)
    golden.check("z_student", imitated, 1e-4, 1e-4)
    for name, cells in (
        ("nf_loss", likelihood_loss(z, log_det, weight)),
        ("st_loss", imitation_loss(z, imitated, weight)),
    ):
        golden.check(f"{name}_per_pixel", cells, 1e-4, 1e-4)
        assert_close(cells.mean((1, 2)), golden.tensor(f"{name}_per_sample"), rtol=5e-5, atol=0)
        assert float(cells.mean()) == pytest.approx(golden.number(name), rel=5e-5)


def test_parameter_counts():
    with torch.device("meta"):
        flows = [parameters(Flow(channels)) for channels in (368, 304, 64)]
        students = [parameters(ConvStudent(channels)) for channels in (368, 304, 64)]
    assert flows == [3_890_568, 3_251_080, 853_000]
    unused = learned({name: torch.empty(shape) for name, shape in ast_student(4, 2).items() if name == "gamma"})
    assert [count + unused for count in students] == [82_601_329, 81_421_617, 76_997_697]


# -- positions and permutations ----------------------------------------------------------------------------------------


def test_positions_by_hand():
    encoding = positional_encoding(32, 5, 7)
    assert encoding.shape == (32, 5, 7)
    assert_close(encoding.square().sum(0), torch.full((5, 7), 16.0))
    assert encoding[:, 0, 0].tolist() == [0, 1] * 16
    found = [encoding[0, 0, 1], encoding[2, 0, 1], encoding[16, 1, 0]]
    assert [round(float(value), 4) for value in found] == [0.8415, 0.311, 0.8415]
    assert torch.equal(encoding[:16, 0], encoding[:16, 3])
    assert torch.equal(encoding[16:, :, 0], encoding[16:, :, 4])


def test_permutations_are_those_of_the_released_program():
    first = {368: ([106, 260, 45, 26, 78], [102, 331, 240, 24, 134]), 304: ([66, 156, 247, 267, 145], None)}
    for channels, (zero, three) in first.items():
        assert channel_permutation(0, channels)[:5].tolist() == zero
        if three:
            assert channel_permutation(3, channels)[:5].tolist() == three
        assert torch.equal(channel_permutation(2, channels).sort().values, torch.arange(channels))


# -- the flow ----------------------------------------------------------------------------------------------------------


def test_a_fresh_flow_only_permutes():
    net, x = Flow(368), noise("x", 2, 368, 3, 3)
    with torch.no_grad():
        z, log_det = net(x)
    expected = x
    for index in range(4):
        expected = expected[:, channel_permutation(index, 368)]
    assert torch.equal(z, expected)
    assert not log_det.any()
    assert likelihood_loss(z, log_det).mean().item() == pytest.approx(184, rel=0.05)


@pytest.mark.parametrize(("channels", "position"), [(6, 4), (5, 8), (4, 0)])
def test_the_inverse_undoes_the_flow(channels, position):
    net, x = disturbed(Flow(channels, position, hidden=8)), noise("x", 2, channels, 4, 3)
    with torch.no_grad():
        z, log_det = net(x)
        assert_close(net.inverse(z), x, rtol=1e-3, atol=1e-3)
    assert (z - x).abs().mean() > 0.1
    assert bool(log_det.abs().gt(0.001).all())


@pytest.mark.parametrize("channels", [4, 5])
def test_log_determinant_is_that_of_the_jacobian(channels):
    net = disturbed(Flow(channels, 4, hidden=8).double())
    x = noise("x", 1, channels, 2, 2).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x)[0], x).reshape(4 * channels, 4 * channels)
    with torch.no_grad():
        log_det = net(x)[1].sum()
    assert abs(float(log_det)) > 0.1
    assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det, rtol=1e-8, atol=1e-8)


def test_scales_are_bounded():
    block = Coupling(2, 0, 4, 1, 1.9)
    for net in (block.of_first, block.of_second):
        net.conv2.weight.data.zero_()
        net.gain.data.fill_(1)
    for sign in (1, -1):
        for net in (block.of_first, block.of_second):
            net.conv2.bias.data = torch.tensor([sign * 1e9, 0.0])
        with torch.no_grad():
            y, log_det = block(torch.ones(1, 2, 1, 1), torch.zeros(1, 0, 1, 1))
        assert_close(log_det.flatten(), torch.tensor([sign * 2 * 1.8981]), rtol=1e-4, atol=0)
        assert_close(y.flatten(), torch.full((2,), 6.673 if sign > 0 else 0.14986), rtol=1e-3, atol=0)


def test_flow_and_student_know_the_place_only_through_the_encoding():
    x = noise("x", 1, 6, 1, 1).expand(1, 6, 11, 11)
    for position, same in ((0, True), (4, False)):
        torch.manual_seed(0)
        z = disturbed(Flow(6, position, 8, (3,)))(x)[0]
        inner = ConvStudent(6, position, 8, 1).eval()(x)[..., 4:-4, 4:-4]
        assert torch.allclose(z[..., :1, :1].expand_as(z), z, atol=1e-5) == same
        assert torch.allclose(inner[..., :1, :1].expand_as(inner), inner, atol=1e-5) == same


# -- the student and losses --------------------------------------------------------------------------------------------


def test_student_block_adds_its_input_behind_the_activation():
    torch.manual_seed(0)
    net = ConvStudent(4, 4, 6, 1, slope=0.2).eval()
    x = noise("x", 2, 4, 5, 5)
    block, leaky = net.blocks[0], torch.nn.LeakyReLU(0.2)
    start = leaky(net.input(torch.cat([positional_encoding(4, 5, 5).expand(2, -1, -1, -1), x], dim=1)))
    inner = leaky(block.norm2(block.conv2(leaky(block.norm1(block.conv1(start))))))
    assert_close(net(x), net.output(start + inner))


def test_losses_by_hand():
    z = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    log_det, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 0.5, 0.0]]])
    assert likelihood_loss(z, log_det).tolist() == [[[11.5, 10.5, 9.5]]]
    assert likelihood_loss(z, log_det, weight).tolist() == [[[11.5, 5.25, 0.0]]]
    assert imitation_loss(z, torch.zeros_like(z), weight).tolist() == [[[12.5, 6.25, 0.0]]]


def test_cells_of_weight_zero_give_neither_loss_nor_gradient():
    weight = torch.ones(1, 2, 2)
    weight[0, 0, 0] = 0
    z, student = noise("z", 1, 3, 2, 2).requires_grad_(), noise("s", 1, 3, 2, 2).requires_grad_()
    loss = imitation_loss(z, student, weight) + likelihood_loss(z, z.sum(1), weight)
    loss.sum().backward()
    assert loss[0, 0, 0] == 0
    for grad in (z.grad, student.grad):
        assert not grad[..., 0, 0].any()
        assert grad.abs().sum(1).count_nonzero() == 3
    assert imitation_loss(torch.full((1, 3, 2, 2), torch.nan), student, 0 * weight).count_nonzero() == 0


def test_training_raises_the_likelihood_and_the_student_tells_what_is_new():
    torch.manual_seed(0)
    x = noise("x", 24, 2, 4, 4) @ noise("A", 4, 4) / 2
    x = torch.cat([x, x.flip(1) + 0.1 * noise("e", 24, 2, 4, 4)], dim=1)  # channels that tell of each other
    teacher, student = Flow(4, 4, 16, (3, 3)), ConvStudent(4, 4, 16, 1)
    fresh = likelihood_loss(*teacher(x)).mean().item()
    optimiser = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        likelihood_loss(*teacher(x)).mean().backward()
        optimiser.step()
    assert likelihood_loss(*teacher(x)).mean().item() < fresh - 1
    z = teacher(x)[0].detach()
    optimiser = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        imitation_loss(z, student(x)).mean().backward()
        optimiser.step()
    student.eval()
    with torch.no_grad():
        known = imitation_loss(z, student(x)).amax((1, 2))
        shifted = x.clone()
        shifted[:, 0] += 6
        new = imitation_loss(teacher(shifted)[0], student(shifted)).amax((1, 2))
    assert new.min() > known.max()


# -- checkpoints and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [32, 0])
def test_every_tensor_of_a_file_finds_its_place(position):
    flow, student = Flow(6, position, 4), ConvStudent(6, position, 8)
    for net, convert, shapes in (
        (flow, flow_state, ast_teacher(6, 4, position)),
        (student, conv_student_state, ast_student(6, 8, position)),
    ):
        state = filled_state(shapes)
        got = convert(state, net)
        assert {id(t) for t in got.values()} == {id(t) for name, t in state.items() if name != "gamma"}
        net.load_state_dict(got)
        with pytest.raises(WeightsError, match=r"'other\.weight', for which"):
            convert(state | {"other.weight": torch.zeros(1)}, net)
        with pytest.raises(WeightsError, match="has nothing for"):
            convert(dict(list(state.items())[3:]), net)
    state = filled_state(ast_teacher(6, 4, position))
    first = f"module_list.{3 if position else 2}"
    assert flow.blocks[0].of_first.gain.item() == state[f"{first}.s1.gamma"].item()
    assert torch.equal(flow.blocks[0].of_second.conv1.weight, state[f"{first}.s2.conv1.weight"])


def test_files_of_another_mode_are_refused():
    with pytest.raises(WeightsError, match="shape"):
        flow_state(filled_state(ast_teacher(6, 4)), Flow(8, hidden=4))
    with pytest.raises(WeightsError, match=r"module_list\.3"):
        flow_state(filled_state(ast_teacher(6, 4)), Flow(6, position=0, hidden=4))


def test_errors_say_what_does_not_fit():
    with pytest.raises(ConfigError, match="multiple of 4, got 6"):
        positional_encoding(6, 2, 2)
    with pytest.raises(ConfigError, match="at least 2 channels"):
        Flow(1)
    with pytest.raises(ConfigError, match=r"odd kernel per block, at least one, got \[3, 4\]"):
        Flow(4, kernels=(3, 4))
    with pytest.raises(ConfigError, match="`blocks`"):
        ConvStudent(4, blocks=-1)
    with pytest.raises(ShapeError, match=r"`x` has shape \(1, 5, 2, 2\)"):
        Flow(4)(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ShapeError, match="weight"):
        imitation_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3))
