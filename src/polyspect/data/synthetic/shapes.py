"""The ten categories of synthetic parts: how a good part of each is drawn.

Each function draws one part on a canvas from the streams of its seed: outline, height, colour, gloss and print, with
the natural variation of its category and the benign flaws of good parts (specks, shallow dimples, slight warp).
Sizes are in millimetres.
"""

from __future__ import annotations

import math

import numpy as np

from ...samples import Array
from .canvas import (
    Canvas,
    Rng,
    Streams,
    Surface,
    coverage,
    digits,
    fractal,
    linear,
    mix,
    noise,
    round_edge,
    rounded_box,
    scatter,
    smoothstep,
    vary,
    wavy_outline,
)


def _benign(surface: Surface, canvas: Canvas, rng: Rng, *, warp: float, dimple: float, speck: float) -> Surface:
    """Add what good parts have too: warp and shallow dimples of either sign (mm), faint specks (opacity)."""
    inside = surface.inside
    lift = warp * noise(rng, canvas, 35.0)
    marks = scatter(rng, canvas, 17.0, 0.3)
    lift += dimple * np.where(marks.value > 0.5, 1, -1) * marks.spots(2.8)
    raised = np.where(surface.height > 0.5, np.maximum(surface.height + lift * inside, 0.3), surface.height)
    specks = scatter(rng, canvas, 9.0, 0.22)
    tone = linear(60, 52, 44) if rng.random() < 0.7 else linear(215, 210, 200)
    return surface.with_(
        height=np.maximum(raised, 0).astype(np.float32),
        base=mix(surface.base, tone, speck * inside * specks.spots(0.75, spread=0.5)),
    )


def _flat_gloss(canvas: Canvas, value: float, rng: Rng, spread: float = 0.15) -> Array:
    return np.float32(value * math.exp(spread * rng.standard_normal())) * (1 + 0.15 * noise(rng, canvas, 14.0))


def _plain(red: int, green: int, blue: int) -> Array:
    return np.asarray(linear(red, green, blue), np.float32).reshape(1, 1, 3)


def _serial(rng: Rng, length: int) -> str:
    return "".join(str(d) for d in rng.integers(0, 10, length))


def bracket(canvas: Canvas, streams: Streams) -> Surface:
    """Milled steel angle: thick plate with holes, a slot, two ribs and a flange; brushed, with a printed lot."""
    shape, look = streams("shape"), streams("look")
    x, y = canvas.x, canvas.y
    plate = rounded_box(x, y, 39 + 0.3 * shape.standard_normal(), 25, 5)
    cut = np.minimum(np.hypot(np.abs(x) - 29, y - 14) - 4.2, rounded_box(x, y - 4, 9, 3.4, 3.3))
    body = np.maximum(plate, -cut)
    rib = rounded_box(np.abs(x) - 22, y + 3, 2.6, 9, 2.5)
    height = 7.5 * round_edge(body, 1.1) + 1.5 * smoothstep(-rib / 2.2)
    flange = rounded_box(x, y + 21.6, 36, 2.7, 1.5)
    height = np.maximum(height, (17 + 0.3 * shape.standard_normal()) * round_edge(flange, 1.3))
    streaks = noise(look, canvas, 0.5, (40, 1)) + 0.6 * noise(look, canvas, 1.6, (22, 1))
    steel = vary(look, linear(158, 160, 163), 0.10, 0.02)
    base = steel * (1 + 0.085 * streaks + 0.06 * fractal(look, canvas, 11))[..., None]
    ink = digits(canvas, "40 " + _serial(look, 4), 0.5 * look.standard_normal(), 15.5, 30)
    ink = ink * (0.85 + 0.1 * look.random())
    gloss = _flat_gloss(canvas, 0.55, look) * (1 + 0.12 * streaks)
    good = Surface(height, base, gloss, coverage(body, canvas), 22.0, ink)
    return _benign(good, canvas, streams("benign"), warp=0.14, dimple=0.10, speck=0.4)


def washer(canvas: Canvas, streams: Streams) -> Surface:
    """Turned ring with chamfers and concentric tool marks, zinc plated with a yellow passivation that varies."""
    shape, look = streams("shape"), streams("look")
    outer, inner = 36 + 0.25 * shape.standard_normal(), 17 + 0.2 * shape.standard_normal()
    body = np.maximum(canvas.r - outer, inner - canvas.r)
    height = (8.5 + 0.1 * shape.standard_normal()) * (0.6 * round_edge(body, 0.6) + 0.4 * smoothstep(-body / 2.6))
    marks = np.interp(canvas.r.ravel(), np.arange(64) * 0.7, look.standard_normal(64)).reshape(canvas.r.shape)
    height = height + 0.035 * marks.astype(np.float32) * (body < -2.4)
    film = smoothstep(0.5 + 0.35 * fractal(look, canvas, 22) + 0.3 * look.standard_normal())
    base = mix(_plain(176, 172, 160), linear(190, 165, 105), film)
    base = base * vary(look, (1, 1, 1), 0.10, 0.03) * (1 + 0.07 * marks + 0.05 * fractal(look, canvas, 3))[..., None]
    good = Surface(height, base, _flat_gloss(canvas, 0.6, look), coverage(body, canvas), 26.0)
    return _benign(good, canvas, streams("benign"), warp=0.10, dimple=0.09, speck=0.4)


def gear(canvas: Canvas, streams: Streams) -> Surface:
    """Moulded spur gear of 24 teeth: rim, recessed web with five holes, hub, bore with keyway; natural nylon."""
    shape, look = streams("shape"), streams("look")
    r, phi = canvas.r, canvas.phi
    tip = 38.5 + 0.25 * shape.standard_normal()
    tooth = smoothstep(0.5 + 0.75 * np.cos(24 * phi))
    outline = (r - (tip - 5.6 + 5.6 * tooth)) * 0.8
    spoke = np.mod(phi + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    window = np.hypot(r * np.cos(spoke) - 19.5, r * np.sin(spoke)) - 4.4
    bore = np.minimum(r - 5.5, rounded_box(canvas.x, canvas.y + 6, 1.6, 2.4, 0.3))
    body = np.maximum(outline, -np.minimum(window, bore))
    web = smoothstep((r - 11.5) / 1.5) * smoothstep((28 - r) / 1.5)
    height = (12 - 3.5 * web) * round_edge(body, 0.9)
    flow = fractal(look, canvas, 9)
    tone = 1 + 0.05 * flow + 0.03 * noise(look, canvas, 0.8)
    base = vary(look, linear(206, 198, 176), 0.07, 0.03) * tone[..., None]
    gate = np.exp(-(((r * np.cos(spoke) - 10) / 3) ** 2) - (r * np.sin(spoke) / 3) ** 2)
    base = base * (1 - 0.12 * look.random() * gate)[..., None]
    good = Surface(height, base, _flat_gloss(canvas, 0.22, look), coverage(body, canvas), 30.0)
    return _benign(good, canvas, streams("benign"), warp=0.12, dimple=0.10, speck=0.4)


def bottle_cap(canvas: Canvas, streams: Streams) -> Surface:
    """Moulded screw cap: knurled skirt, rounded shoulder, shallow panel with a printed rosette, ring and lot."""
    shape, look = streams("shape"), streams("look")
    r, phi = canvas.r, canvas.phi
    body = r - (35.5 + 0.5 * np.cos(48 * phi))
    height = (12 + 0.15 * shape.standard_normal()) * (0.4 * round_edge(body, 1.0) + 0.6 * round_edge(body, 6.5))
    height = height - 0.8 * smoothstep((26.5 - r) / 1.6)
    red = vary(look, linear(176, 38, 34), 0.09, 0.05)
    base = red * (1 + 0.04 * fractal(look, canvas, 8) + 0.03 * noise(look, canvas, 0.9))[..., None]
    turn = 0.12 * look.standard_normal()
    rosette = r - 11.5 * (0.68 + 0.32 * np.cos(6 * (phi + turn)))
    ink = np.maximum(coverage(np.maximum(rosette, 3.2 - r), canvas), coverage(np.abs(r - 22.5) - 0.8, canvas))
    ink = np.maximum(ink, digits(canvas, _serial(look, 5), 0, 17, 15)) * (0.86 + 0.1 * look.random())
    ink = ink * np.clip(1 + 0.08 * noise(look, canvas, 5), 0.6, 1)
    gloss = _flat_gloss(canvas, 0.5, look)
    good = Surface(height, base, gloss, coverage(body, canvas), 55.0, ink, linear(235, 228, 210))
    return _benign(good, canvas, streams("benign"), warp=0.13, dimple=0.10, speck=0.35)


def biscuit(canvas: Canvas, streams: Streams) -> Surface:
    """Round baked biscuit with a scalloped rim, docking holes and an embossed ring; browned unevenly."""
    shape, look = streams("shape"), streams("look")
    r, phi = canvas.r, canvas.phi
    size = 35 * wavy_outline(shape, phi, range(2, 6), 0.02)
    body = r - size * (1 + 0.028 * np.cos(22 * (phi + shape.uniform(0, 0.3))))
    height = (8.5 + 0.4 * shape.standard_normal()) * round_edge(body, 3.2) + 0.36 * fractal(shape, canvas, 12, 3)
    height += 0.13 * fractal(shape, canvas, 1.6, 2) + 0.55 * np.exp(-(((r - 26) / 1.1) ** 2))
    ring = np.where(r < 15, 10, 19)  # mm, the two circles of docking holes around the one in the centre
    step = 2 * math.pi / np.where(r < 15, 6, 11)
    turn = np.mod(phi + shape.uniform(0, 6), step) - step / 2
    hole = smoothstep(1.4 - np.minimum(np.hypot(r * np.cos(turn) - ring, r * np.sin(turn)), r))
    height = np.maximum(height - 2.2 * hole, 0.6) * (body < 0)
    bake = 0.35 + 0.1 * look.standard_normal() + 0.45 * smoothstep((r - 0.7 * size) / (0.3 * size))
    bake = np.clip(bake + 0.13 * fractal(look, canvas, 14, 4) + 0.25 * hole, 0, 1)
    crumb = 1 + 0.09 * noise(look, canvas, 0.8) + 0.07 * fractal(look, canvas, 2.5, 2)
    base = mix(_plain(228, 190, 130), linear(150, 88, 38), bake)
    base = base * (vary(look, (1, 1, 1), 0.05, 0.02) * crumb[..., None])
    good = Surface(height, base, _flat_gloss(canvas, 0.05, look), coverage(body, canvas), 12.0)
    return _benign(good, canvas, streams("benign"), warp=0.15, dimple=0.2, speck=0.5)


def bun(canvas: Canvas, streams: Streams) -> Surface:
    """Domed bread bun, egg-washed crust browner on top, strewn with sesame."""
    shape, look = streams("shape"), streams("look")
    ratio = canvas.r / (39 * wavy_outline(shape, canvas.phi, range(2, 6), 0.05))
    body = (ratio - 1) * 38
    top = 25 + 1.5 * shape.standard_normal()
    dome = np.sqrt(np.clip(1 - ratio**2.4, 0, 1))
    height = top * (0.25 * round_edge(body, 1.2) + 0.75 * dome) + 0.5 * fractal(shape, canvas, 16, 2) * dome
    height += 0.10 * fractal(shape, canvas, 1.8, 2) * dome
    bake = np.clip(dome * 1.1 - 0.35 + 0.08 * look.standard_normal() + 0.16 * fractal(look, canvas, 15, 4), 0, 1)
    base = mix(_plain(226, 178, 108), linear(148, 78, 30), bake)
    base = base * (vary(look, (1, 1, 1), 0.06, 0.025) * (1 + 0.06 * fractal(look, canvas, 1.2, 2))[..., None])
    seeds = scatter(look, canvas, 6.0, 0.62, 0.6)
    sesame = seeds.spots(1.15, 1.7, 0.15) * (ratio < 0.82)
    base = mix(base, vary(look, linear(235, 212, 165), 0.04, 0.01), np.clip(1.4 * sesame, 0, 1))
    height = (height + 0.8 * np.sqrt(sesame)) * (body < 0)
    gloss = _flat_gloss(canvas, 0.16, look, 0.25)
    good = Surface(height, base, gloss, coverage(body, canvas), 14.0)
    return _benign(good, canvas, streams("benign"), warp=0.15, dimple=0.25, speck=0.5)


def tuber(canvas: Canvas, streams: Streams) -> Surface:
    """Potato-like tuber: an irregular rounded body with eyes, netted skin, lenticels and traces of soil."""
    shape, look = streams("shape"), streams("look")
    a, b = 44 + 2.5 * shape.standard_normal(), 30 + 2 * shape.standard_normal()
    ellipse = np.hypot(canvas.x / a, canvas.y / b)
    ratio = ellipse / wavy_outline(shape, canvas.phi, range(2, 7), 0.07)
    body = (ratio - 1) * 30
    dome = np.sqrt(np.clip(1 - ratio**2.2, 0, 1))
    height = (27 + 2 * shape.standard_normal()) * (0.35 * round_edge(body, 1.5) + 0.65 * dome)
    height += (0.9 * fractal(shape, canvas, 18, 2) + 0.07 * fractal(shape, canvas, 1.5, 2)) * dome
    eyes = scatter(shape, canvas, 19.0, 0.55, 0.7).spots(2.6, 1.6, 0.3) * (ratio < 0.85)
    height = (height - 1.1 * eyes) * (body < 0)
    skin = fractal(look, canvas, 3.2, 3)
    tone = 1 + 0.10 * fractal(look, canvas, 20) + 0.09 * skin
    base = vary(look, linear(188, 150, 98), 0.08, 0.04) * tone[..., None]
    net = np.exp(-((noise(look, canvas, 4.5) / 0.09) ** 2)) * smoothstep(0.5 + noise(look, canvas, 25))
    base = mix(base, linear(128, 96, 62), 0.45 * net)
    base = mix(base, linear(104, 74, 48), 0.6 * eyes)
    base = mix(base, linear(116, 86, 56), 0.7 * scatter(look, canvas, 4.5, 0.4, 0.8).spots(0.6))
    soil = smoothstep(0.9 * fractal(look, canvas, 12, 4) - 0.9 + 0.3 * look.standard_normal())
    base = mix(base, linear(92, 70, 50), 0.5 * soil)
    good = Surface(height, base, _flat_gloss(canvas, 0.06, look), coverage(body, canvas), 10.0)
    return _benign(good, canvas, streams("benign"), warp=0.15, dimple=0.25, speck=0.5)


def cord(canvas: Canvas, streams: Streams) -> Surface:
    """Piece of laid cord, three strands with a coloured tracer, lying in a loose curve; ends bound with tape."""
    shape, look = streams("shape"), streams("look")
    waves = [(shape.normal(0, s), k / 90 * 2 * math.pi, shape.uniform(0, 6.3)) for s, k in ((3.5, 0.5), (2.0, 1.0))]
    curve = slope = np.zeros_like(canvas.x)
    for size, k, phase in waves:
        curve = curve + np.float32(size) * np.sin(np.float32(k) * canvas.x + np.float32(phase))
        slope = slope + np.float32(size * k) * np.cos(np.float32(k) * canvas.x + np.float32(phase))
    curve = curve - np.float32(np.mean(curve))
    stretch = np.sqrt(1 + slope**2)
    across = (canvas.y - curve) / stretch
    along = np.cumsum(stretch, axis=1) * canvas.cell
    radius = 7 + 0.2 * shape.standard_normal() + 0.15 * noise(shape, canvas, 18)
    half = 43 + 0.8 * shape.standard_normal()
    body = np.maximum(np.abs(across) - radius, (np.abs(canvas.x) - half) * 0.95)
    q = np.clip(across / radius, -1, 1)
    pitch = 8.5 + 0.4 * shape.standard_normal()
    lay = along / pitch + np.arcsin(q) * np.float32(0.42) + shape.random()
    strand = np.abs(np.sin(lay * math.pi))  # 0 in the grooves
    tape = smoothstep((np.abs(canvas.x) - half + 7) / 0.5)
    groove = (1 - tape) * (1 - smoothstep(strand / 0.75))
    height = radius * (1 + np.sqrt(1 - q**2)) - 1.9 * groove + 0.09 * noise(shape, canvas, 0.9, (3, 1))
    height = height * round_edge(body, 1.0)
    fibre = noise(look, canvas, 0.6, (5, 1)) + noise(look, canvas, 1.3)
    tone = 1 + 0.10 * fibre + 0.05 * fractal(look, canvas, 16)
    base = vary(look, linear(196, 176, 138), 0.07, 0.03) * tone[..., None]
    tracer = smoothstep((np.cos((lay / 3 - np.floor(lay / 3)) * 2 * math.pi) - 0.78) / 0.1)
    base = mix(base, vary(look, linear(58, 84, 128), 0.08, 0.03), 0.85 * tracer)
    base = mix(base * (1 - 0.55 * groove)[..., None], vary(look, linear(40, 42, 46), 0.1, 0.02), tape)
    good = Surface(height, base, 0.05 + 0.25 * tape * _flat_gloss(canvas, 1, look), coverage(body, canvas), 16.0)
    return _benign(good, canvas, streams("benign"), warp=0.15, dimple=0.2, speck=0.5)


def foam_block(canvas: Canvas, streams: Streams) -> Surface:
    """Cut block of soft open-pored foam, sagging and slightly sheared, with a stamped lot number."""
    shape, look = streams("shape"), streams("look")
    x = canvas.x + 0.03 * shape.standard_normal() * canvas.y + 0.7 * noise(shape, canvas, 24)
    y = canvas.y + 0.02 * shape.standard_normal() * canvas.x + 0.7 * noise(shape, canvas, 24)
    body = rounded_box(x, y, 39 + 0.7 * shape.standard_normal(), 28 + 0.6 * shape.standard_normal(), 4)
    height = (20 + 0.8 * shape.standard_normal()) * (0.75 * round_edge(body, 1.8) + 0.25 * round_edge(body, 9))
    height += (0.45 * noise(shape, canvas, 20) + 0.12 * noise(shape, canvas, 3)) * (body < 0)
    pores = scatter(look, canvas, 2.4, 0.75, 0.9).spots(0.8, 1.2, 0.5)
    pores = np.maximum(pores, scatter(look, canvas, 5.5, 0.35, 0.8).spots(1.4, 1.2, 0.4))
    height = (height - 0.35 * pores * (body < -1)).astype(np.float32)
    base = vary(look, linear(222, 196, 92), 0.07, 0.035) * (1 + 0.05 * fractal(look, canvas, 15))[..., None]
    base = base * (1 + 0.06 * noise(look, canvas, 0.8) - 0.34 * pores)[..., None]
    text = digits(canvas, "7 " + _serial(look, 4), 2 * look.standard_normal(), 12 + look.standard_normal(), 34)
    ink = text * np.clip(0.75 + 0.1 * look.standard_normal() - 0.4 * pores, 0, 1)
    gloss = _flat_gloss(canvas, 0.03, look)
    good = Surface(height, base, gloss, coverage(body, canvas), 8.0, ink, linear(52, 62, 112))
    return _benign(good, canvas, streams("benign"), warp=0.25, dimple=0.25, speck=0.5)


def gasket(canvas: Canvas, streams: Streams) -> Surface:
    """Moulded rubber seal: a bead around a soft rounded frame with two bolt lugs, lying slightly out of shape."""
    shape, look = streams("shape"), streams("look")
    x = canvas.x + 1.3 * noise(shape, canvas, 40) + 0.4 * noise(shape, canvas, 15)
    y = canvas.y + 1.3 * noise(shape, canvas, 40) + 0.4 * noise(shape, canvas, 15)
    loop = np.abs(rounded_box(x, y, 31, 23, 14)) - 6.0
    eye = np.hypot(np.abs(x) - 40, y)
    lug = eye - 6.8
    body = np.maximum(np.minimum(loop, lug), 3.1 - eye)
    flat = 7 * round_edge(np.maximum(np.minimum(loop, lug), 3.1 - eye), 1.0)
    bead = 2.6 * np.sqrt(np.clip(1 - ((loop + 6.0) / 3.0) ** 2, 0, 1))
    height = flat + bead * smoothstep(-loop) + 0.04 * noise(shape, canvas, 1.2) * (body < 0)
    bloom = smoothstep(0.25 + 0.3 * fractal(look, canvas, 16, 3) + 0.15 * look.standard_normal())
    base = vary(look, linear(52, 53, 56), 0.12, 0.03) * (1 + 0.07 * noise(look, canvas, 0.8))[..., None]
    base = mix(base, linear(104, 104, 106), 0.35 * bloom)
    good = Surface(height, base, _flat_gloss(canvas, 0.12, look, 0.25), coverage(body, canvas), 14.0)
    return _benign(good, canvas, streams("benign"), warp=0.25, dimple=0.12, speck=0.3)
