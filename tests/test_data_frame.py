"""The prepared square grid: where pixels go, and back."""

import numpy as np
import pytest
from PIL import Image

from polyspect.data.frame import Frame, restore
from polyspect.errors import ShapeError

SHAPES = [(160, 160), (120, 200), (90, 40), (300, 500)]
ASPECTS = ["pad", "squash", "crop"]


def smooth(height, width):
    row, column = np.mgrid[:height, :width]
    return (np.sin(row / 25) + np.cos(column / 20) + 0.01 * row).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "side", "top", "left"),
    [((400, 900), 900, 250, 0), ((600, 800), 800, 100, 0), ((800, 800), 800, 0, 0), ((450, 500), 500, 25, 0),
     ((410, 433), 500, 45, 33)],
)  # fmt: skip
def test_padding_of_btf_by_hand(shape, side, top, left):
    frame = Frame.fit(*shape, 224, aspect="pad", pad_multiple=100)
    assert (frame.canvas_height, frame.canvas_width, frame.top, frame.left) == (side, side, top, left)
    assert side - top - shape[0] - top in (0, 1)  # the odd row goes below


@pytest.mark.parametrize("source", [7, 32, 100, 257])
def test_nearest_follows_eq_1_and_eq_2(source):
    image = np.arange(source * source).reshape(source, source)
    for nearest, shift in (("corner", 0.0), ("centre", 0.5)):
        frame = Frame.fit(source, source, 64, aspect="squash", nearest=nearest)
        index = [int(np.floor((k + shift) * source / 64)) for k in range(64)]
        assert (frame.take_nearest(image) == image[np.ix_(index, index)]).all()


def test_nearest_corner_is_torchs_nearest():
    import torch

    image = np.random.default_rng(0).random((37, 53)).astype(np.float32)
    frame = Frame.fit(37, 53, 48, aspect="squash", nearest="corner")
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None, None], size=(48, 48), mode="nearest")
    assert (frame.take_nearest(image) == expected[0, 0].numpy()).all()


def test_padding_is_zero_or_edge_and_known_as_outside():
    image = np.full((20, 40, 3), 200, np.uint8)
    frame = Frame.fit(20, 40, 40, aspect="pad")
    inside = frame.inside()
    assert inside.sum() == 800
    assert inside[10:30].all()
    assert (frame.take_nearest(image)[inside] == 200).all()
    assert not frame.take_nearest(image)[~inside].any()
    assert not frame.take_filtered(image)[~inside].any()
    assert (frame.take_filtered(image, edge=True) == 200).all()


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_rgb_is_pillows_resize(method):
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    frame = Frame.fit(90, 70, 32, aspect="squash")
    expected = Image.fromarray(image).resize((32, 32), getattr(Image.Resampling, method.upper()))
    assert (frame.take_filtered(image, method) == np.asarray(expected)).all()


def test_channels_of_an_extra_view_are_resized_one_by_one():
    image = np.random.default_rng(0).random((50, 60, 5)).astype(np.float32)
    frame = Frame.fit(50, 60, 24, aspect="squash")
    out = frame.take_filtered(image)
    assert out.shape == (24, 24, 5)
    assert (out[..., 3] == frame.take_filtered(image[..., 3])).all()
    np.testing.assert_allclose(out.mean(), image.mean(), atol=0.01)
    narrow = frame.take_filtered((255 * image[..., :2]).astype(np.uint8))
    assert narrow.dtype == np.uint8
    assert narrow.shape == (24, 24, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_map_comes_back_to_where_it_was(shape, aspect):
    frame = Frame.fit(*shape, 128, aspect=aspect)
    original = smooth(*shape)
    back = restore(frame.take_filtered(original), frame)
    assert back.shape == shape
    seen = frame.restore_mask(np.ones((128, 128), bool))
    if aspect != "crop":
        assert seen.all()
    inner = np.zeros(shape, bool)
    inner[8:-8, 8:-8] = True
    inner &= np.roll(seen, 8, 0) & np.roll(seen, -8, 0) & np.roll(seen, 8, 1) & np.roll(seen, -8, 1)
    assert np.abs(back - original)[inner].max() < 0.06
    assert (frame.restore(frame.take_filtered(original), outside=-7)[~seen] == -7).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("nearest", ["centre", "corner"])
def test_masks_come_back(shape, aspect, nearest):
    frame = Frame.fit(*shape, 512, aspect=aspect, nearest=nearest)  # finer than the input: nothing is lost
    mask = smooth(*shape) > 0.9 if nearest == "corner" else np.random.default_rng(0).random(shape) < 0.3
    seen = frame.restore_mask(np.ones((512, 512), bool))
    back = frame.restore_mask(frame.take_nearest(mask))
    assert not back[~seen].any()
    assert (back == mask)[seen].mean() > (0.9999 if nearest == "centre" else 0.97)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_points_go_there_and_back_and_agree_with_nearest_sampling(shape, aspect):
    frame = Frame.fit(*shape, 100, aspect=aspect)
    points = np.random.default_rng(0).random((50, 2)) * shape
    np.testing.assert_allclose(frame.restore_points(frame.place_points(points)), points, atol=1e-9)
    rows = np.broadcast_to(np.arange(shape[0], dtype=float)[:, None], shape)
    prepared = np.argwhere(frame.inside())
    exact = frame.restore_points(prepared)[:, 0]
    taken = frame.take_nearest(rows)[prepared[:, 0], prepared[:, 1]]
    assert np.abs(exact - taken).max() <= 0.5 + 1e-9


def test_a_map_of_another_size_is_refused():
    frame = Frame.fit(100, 100, 64, aspect="pad")
    with pytest.raises(ShapeError, match="64x64"):
        restore(np.zeros((32, 32), np.float32), frame)
    with pytest.raises(ShapeError, match="64x64"):
        frame.restore_mask(np.zeros((32, 32), bool))


def test_frame_survives_json():
    frame = Frame.fit(120, 200, 64, aspect="crop", nearest="corner")
    assert Frame.from_dict(frame.to_dict()) == frame
