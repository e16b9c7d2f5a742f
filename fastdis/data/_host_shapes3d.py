"""The renderer of the coloured 3D shapes: compiled, and the same in NumPy.

A ray-caster finds, once for every geometry, how much of a pixel the floor, the wall and the object fill, and in what
light. Light is linear in the colours, so that every colouring of a geometry is then a sum of three products. All that
is added up are whole numbers: neither threads nor instruction sets change an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdis.ops._backends import extension

SURFACES = ("floor", "wall", "object")
FULL = 65535  # the weight of a surface that fills a pixel in full light
FULL_COLOR = 255 * 256

Vector = Sequence[Any]  # x, y, z: numbers, or arrays with an element for each ray
Interval = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """The room. Lengths are in its own units, z points up, the object stands on the floor, z = 0, at the origin.

    The walls are the planes y = ``room``, behind the object, and x = -``room`` and ``room``; the room is open towards
    the camera, and has no ceiling. The camera is ``distance`` from the axis x = y = 0, at ``height``, looks at that
    axis at the height ``target``, and sees ``view`` degrees from side to side. The azimuth turns it about the axis, to
    the right for positive angles. ``light`` is the direction to a light as far away as the sun, and ``ambient`` the
    share of the light that reaches every point.
    """

    room: float = 5.0
    distance: float = 7.0
    height: float = 4.0
    target: float = 1.05
    view: float = 46.0
    light: tuple[float, float, float] = (-0.5, -0.7, 0.9)
    ambient: float = 0.45

    def numbers(self) -> np.ndarray:
        """Return what the renderer takes: float64 [8], the light as a unit vector, the view as a tangent."""
        light = np.array(self.light) / np.sqrt(np.dot(self.light, self.light))
        tangent = np.tan(np.radians(self.view) / 2)
        return np.array([self.room, self.distance, self.height, self.target, tangent, *light, self.ambient])


def weights(scene: np.ndarray, geometries: np.ndarray, size: int, samples: int) -> np.ndarray:
    """Cast the rays.

    Parameters
    ----------
    scene : ndarray of float64, [8]
        From :meth:`Scene.numbers`.
    geometries : ndarray of float64, [g, 5]
        Shape (0 cube, 1 cylinder, 2 sphere, 3 capsule), radius (of the cube: half a side), height, and cosine and sine
        of the azimuth.
    size : int
        Height and width in pixels.
    samples : int
        A pixel is the mean of ``samples ** 2`` rays.

    Returns
    -------
    ndarray of uint16, [g, 3, size * size]
        What floor, wall and object give to each pixel: coverage times light, 65535 for all of it.
    """
    if extension is None:
        return weights_numpy(scene, geometries, size, samples)
    return extension.shapes3d_weights(scene, geometries, size, samples, torch.get_num_threads())


def images(weights: np.ndarray, colors: np.ndarray, out: np.ndarray) -> None:
    """Colour every geometry in every way.

    Parameters
    ----------
    weights : ndarray of uint16, [g, 3, pixels]
        From :func:`weights`.
    colors : ndarray of uint16, [c, 3, 3]
        Red, green and blue of floor, wall and object; 255 * 256 for a full channel.
    out : ndarray of uint8, [c, g, pixels, 3]
        Is overwritten with ``(sum over surfaces of (weight * color >> 16) + 128) >> 8``.
    """
    if extension is None:
        images_numpy(weights, colors, out)
    else:
        extension.shapes3d_images(weights, colors, out, torch.get_num_threads())


# The same in NumPy: the oracle, and what runs where nothing was compiled. Every sum and product is written in the order
# in which the compiled code has it, which makes the two equal to the last bit where the compiler fuses none of them.


def weights_numpy(scene: np.ndarray, geometries: np.ndarray, size: int, samples: int) -> np.ndarray:
    """Cast the rays as :func:`weights` does, with NumPy."""
    out = np.empty((len(geometries), len(SURFACES), size * size), np.uint16)
    with np.errstate(divide="ignore", invalid="ignore"):
        for geometry, rows in zip(geometries, out, strict=True):
            surface, light = _cast(scene, geometry, size * samples)
            levels = (light * FULL + 0.5).astype(np.int64)
            for k, row in enumerate(rows):
                level = np.where(surface == k, levels, 0).reshape(size, samples, size, samples).sum(axis=(1, 3))
                row[:] = ((level + samples**2 // 2) // samples**2).reshape(-1)
    return out


def images_numpy(weights: np.ndarray, colors: np.ndarray, out: np.ndarray) -> None:
    """Colour every geometry as :func:`images` does, with NumPy."""
    wide = weights.astype(np.uint32)
    for coloring, image in zip(colors.astype(np.uint32), out, strict=True):
        for channel in range(3):
            level = sum(wide[:, k] * coloring[k, channel] >> 16 for k in range(len(SURFACES)))
            image[:, :, channel] = level + 128 >> 8


def _cast(scene: np.ndarray, geometry: np.ndarray, rays: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which surface each of rays * rays rays meets first, and the light there, both [rays * rays]."""
    room, distance, height, target, tangent, *light, ambient = scene
    cosine, sine = geometry[3:]
    drop = target - height
    length = np.sqrt(distance * distance + drop * drop)
    level, down = distance / length, drop / length
    camera = (distance * sine, -distance * cosine, height)
    forward, right, up = (
        (-level * sine, level * cosine, down),
        (cosine, sine, 0.0),
        (sine * down, -cosine * down, level),
    )
    step = 2.0 * tangent / rays
    along = (np.arange(rays) + 0.5) * step
    u, v = (grid.ravel() for grid in np.meshgrid(along - tangent, tangent - along))
    d = tuple(f + u * r + v * w for f, r, w in zip(forward, right, up, strict=True))

    t, normal = _enter(geometry, camera, d)
    floor = np.where(d[2] < 0, -height / d[2], np.inf)
    back = np.where(d[1] > 0, (room - camera[1]) / d[1], np.inf)
    side = (np.where(d[0] < 0, -room, room) - camera[0]) / d[0]
    hit = t < np.inf
    on_floor = ~hit & (floor <= back) & (floor <= side)
    on_back = ~hit & ~on_floor & (back <= side)
    on_side = ~(hit | on_floor | on_back)
    surface = np.where(hit, 2, np.where(on_floor, 0, 1))
    t = np.where(hit, t, np.minimum(np.minimum(floor, back), side))
    planes = (
        np.where(on_side, np.where(d[0] < 0, 1.0, -1.0), 0.0),
        np.where(on_back, -1.0, 0.0),
        np.where(on_floor, 1.0, 0.0),
    )
    facing = _dot([np.where(hit, n, plane) for n, plane in zip(normal, planes, strict=True)], light)
    shaded, _ = _enter(geometry, tuple(o + t * w for o, w in zip(camera, d, strict=True)), light)
    lit = (facing > 0) & (hit | (shaded == np.inf))
    return surface, np.where(lit, ambient + (1.0 - ambient) * facing, ambient)


def _enter(geometry: np.ndarray, o: Vector, d: Vector) -> tuple[np.ndarray, Vector]:
    """Return where rays o + t d first meet the object, infinity where they do not, and its normal there."""
    shape, radius, height = geometry[:3]
    enter = _enter_box if shape == 0 else _enter_cylinder if shape == 1 else _enter_capsule
    return enter(o, d, radius, height)


def _enter_box(o: Vector, d: Vector, radius: float, height: float) -> tuple[np.ndarray, Vector]:
    x, y = (_between(o[k], d[k], -radius, radius) for k in (0, 1))
    z = _between(o[2], d[2], 0, height)
    near, far = np.maximum(np.maximum(x[0], y[0]), z[0]), np.minimum(np.minimum(x[1], y[1]), z[1])
    on_x = near == x[0]
    on_y = ~on_x & (near == y[0])
    sign = [np.where(axis < 0, 1.0, -1.0) for axis in d]
    normal = np.where(on_x, sign[0], 0.0), np.where(on_y, sign[1], 0.0), np.where(on_x | on_y, 0.0, sign[2])
    return np.where((near < far) & (near > 0), near, np.inf), normal


def _enter_cylinder(o: Vector, d: Vector, radius: float, height: float) -> tuple[np.ndarray, Vector]:
    tube, z = _inside_tube(o, d, radius), _between(o[2], d[2], 0, height)
    near, far = np.maximum(tube[0], z[0]), np.minimum(tube[1], z[1])
    top = near == z[0]
    normal = (
        np.where(top, 0.0, (o[0] + near * d[0]) / radius),
        np.where(top, 0.0, (o[1] + near * d[1]) / radius),
        np.where(top, np.where(d[2] < 0, 1.0, -1.0), 0.0),
    )
    return np.where((near < far) & (near > 0), near, np.inf), normal


def _enter_capsule(o: Vector, d: Vector, radius: float, height: float) -> tuple[np.ndarray, Vector]:
    low, high = radius, height - radius
    near = _inside_tube(o, d, radius)[0]
    side = o[2] + near * d[2]
    near = np.where((near > 0) & (side > low) & (side < high), near, np.inf)
    for centre in (low, high):
        start = (o[0], o[1], o[2] - centre)
        t = _inside(_dot(d, d), _dot(start, d), _dot(start, start) - radius * radius)[0]
        near = np.where(t > 0, np.minimum(near, t), near)
    x, y, z = (o[k] + near * d[k] for k in range(3))
    axis = np.minimum(np.maximum(z, low), high)
    return near, (x / radius, y / radius, (z - axis) / radius)


def _inside_tube(o: Vector, d: Vector, radius: float) -> Interval:
    return _inside(d[0] * d[0] + d[1] * d[1], o[0] * d[0] + o[1] * d[1], o[0] * o[0] + o[1] * o[1] - radius * radius)


def _inside(a: Any, b: Any, c: Any) -> Interval:
    """Return where a ray is inside of a t^2 + 2 b t + c = 0: from the first to the second; (inf, -inf) is nowhere."""
    square = b * b - a * c
    root = np.sqrt(np.maximum(square, 0.0))
    return np.where(square > 0, (-b - root) / a, np.inf), np.where(square > 0, (-b + root) / a, -np.inf)


def _between(o: Any, d: Any, low: float, high: float) -> Interval:
    """Return where a ray is between two parallel planes."""
    a, b = (low - o) / d, (high - o) / d
    return np.minimum(a, b), np.maximum(a, b)


def _dot(a: Vector, b: Vector) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
