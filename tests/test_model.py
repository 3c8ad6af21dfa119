import pytest
import torch
from torch import nn

from model import CustomResNet, ModifiedResBlock

TABLE = """
Conv2d 64x32x32 1728 | BatchNorm2d 64x32x32 128 | ReLU 64x32x32 0
Conv2d 128x32x32 73728 | MaxPool2d 128x16x16 0 | BatchNorm2d 128x16x16 256 | ReLU 128x16x16 0
Conv2d 128x16x16 147456 | BatchNorm2d 128x16x16 256 | ReLU 128x16x16 0
Conv2d 128x16x16 147456 | BatchNorm2d 128x16x16 256 | ReLU 128x16x16 0 | ModifiedResBlock 128x16x16 369408
Conv2d 256x16x16 294912 | MaxPool2d 256x8x8 0 | BatchNorm2d 256x8x8 512 | ReLU 256x8x8 0
Conv2d 512x8x8 1179648 | MaxPool2d 512x4x4 0 | BatchNorm2d 512x4x4 1024 | ReLU 512x4x4 0
Conv2d 512x4x4 2359296 | BatchNorm2d 512x4x4 1024 | ReLU 512x4x4 0
Conv2d 512x4x4 2359296 | BatchNorm2d 512x4x4 1024 | ReLU 512x4x4 0 | ModifiedResBlock 512x4x4 5901312
MaxPool2d 512x1x1 0 | Linear 10 5130
"""
PARAMETERS = 6_573_130


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_layers_in_the_order_their_forward_calls_end():
    model, rows = CustomResNet(), []

    def record(module, _, output):
        rows.append(f"{type(module).__name__} {'x'.join(map(str, output.shape[1:]))} {count(module)}")

    for module in model.modules():
        if isinstance(module, ModifiedResBlock) or not list(module.children()):
            module.register_forward_hook(record)
    model(torch.randn(2, 3, 32, 32))
    expected = [row.strip() for line in TABLE.strip().splitlines() for row in line.split("|")]
    assert len(expected) == 31
    assert rows == expected


@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_parameters_are_the_same_for_every_norm_and_all_trainable(norm):
    model = CustomResNet(norm=norm)
    assert count(model) == PARAMETERS
    assert all(p.requires_grad for p in model.parameters())


def test_parts_have_the_stated_settings():
    for module in CustomResNet().modules():
        if isinstance(module, nn.Conv2d):
            assert (module.kernel_size, module.padding, module.bias) == ((3, 3), (1, 1), None)
    layer = [m for m in CustomResNet(norm="layer").modules() if isinstance(m, nn.GroupNorm)]
    assert [m.num_groups for m in layer] == [1] * 8
    group = [m for m in CustomResNet(norm="group").modules() if isinstance(m, nn.GroupNorm)]
    assert [m.num_groups for m in group] == [32] * 8


def test_a_block_adds_its_residual_to_its_stem():
    model = CustomResNet(width=4).eval()
    block = next(m for m in model.modules() if isinstance(m, ModifiedResBlock))
    image = torch.randn(2, 4, 32, 32)
    conv, pool, norm, relu = block.stem
    x = relu(norm(pool(conv(image))))
    assert torch.equal(block(image), x + block.res(x))


@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
@pytest.mark.parametrize("width", [1, 6, 16])
def test_small_widths_learn(norm, width):
    model = CustomResNet(num_classes=3, width=width, norm=norm)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_narrow_network_has_about_0_41_million_parameters():
    assert count(CustomResNet(width=16)) == 412_954


def test_logit_scale_multiplies_the_logits():
    plain, scaled = CustomResNet(width=4).eval(), CustomResNet(width=4, logit_scale=0.125).eval()
    scaled.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 32, 32)
    assert torch.allclose(scaled(image), plain(image) * 0.125)


@pytest.mark.parametrize(
    ("arguments", "given", "allowed"),
    [
        ({"norm": "instance"}, "'instance'", "'batch', 'layer', 'group'"),
        ({"width": 0}, "width is 0", "at least 1"),
        ({"width": -16}, "width is -16", "at least 1"),
        ({"width": 16.0}, "width is 16.0", "whole number"),
        ({"num_classes": 1}, "num_classes is 1", "at least 2"),
    ],
)
def test_a_wrong_argument_says_what_was_given_and_what_is_allowed(arguments, given, allowed):
    with pytest.raises(ValueError, match=given) as error:
        CustomResNet(**arguments)
    assert allowed in str(error.value)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 28, 28), (1, 32, 32, 3)])
def test_a_wrong_input_shape_says_what_was_given_and_what_is_allowed(shape):
    with pytest.raises(ValueError, match=r"must be \(N, 3, 32, 32\)") as error:
        CustomResNet(width=4)(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_bytes_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        CustomResNet(width=4)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
