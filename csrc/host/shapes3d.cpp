#include "shapes3d.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../core/isa.h"
#include "../core/threads.h"

namespace fastdis::host {
namespace {

constexpr double miss = std::numeric_limits<double>::infinity();
constexpr int surfaces = 3, channels = 3;
enum Surface { on_floor, on_wall, on_object };

struct Vector {
  double x, y, z;
};

inline Vector operator+(const Vector& a, const Vector& b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
inline Vector operator*(double t, const Vector& a) { return {t * a.x, t * a.y, t * a.z}; }
inline double dot(const Vector& a, const Vector& b) { return a.x * b.x + a.y * b.y + a.z * b.z; }

struct Interval {
  double near, far;
};

// Where a ray o + t d runs between two parallel planes.
Interval between(double o, double d, double low, double high) {
  const double a = (low - o) / d, b = (high - o) / d;
  return {std::min(a, b), std::max(a, b)};
}

// Where a ray is inside of a t^2 + 2 b t + c = 0.
Interval inside(double a, double b, double c) {
  const double square = b * b - a * c;
  if (!(square > 0.0)) return {miss, -miss};
  const double root = std::sqrt(square);
  return {(-b - root) / a, (-b + root) / a};
}

Interval inside_tube(const Vector& o, const Vector& d, double radius) {
  return inside(d.x * d.x + d.y * d.y, o.x * d.x + o.y * d.y, o.x * o.x + o.y * o.y - radius * radius);
}

struct Hit {
  double t;  // infinite where the ray misses
  Vector normal;
};

// The first point of a box on the floor.
Hit enter_box(const Vector& o, const Vector& d, double radius, double height) {
  const Interval x = between(o.x, d.x, -radius, radius), y = between(o.y, d.y, -radius, radius);
  const Interval z = between(o.z, d.z, 0.0, height);
  const double near = std::max(std::max(x.near, y.near), z.near), far = std::min(std::min(x.far, y.far), z.far);
  if (!(near < far && near > 0.0)) return {miss, {}};
  if (near == x.near) return {near, {d.x < 0.0 ? 1.0 : -1.0, 0.0, 0.0}};
  if (near == y.near) return {near, {0.0, d.y < 0.0 ? 1.0 : -1.0, 0.0}};
  return {near, {0.0, 0.0, d.z < 0.0 ? 1.0 : -1.0}};
}

Hit enter_cylinder(const Vector& o, const Vector& d, double radius, double height) {
  const Interval tube = inside_tube(o, d, radius), z = between(o.z, d.z, 0.0, height);
  const double near = std::max(tube.near, z.near), far = std::min(tube.far, z.far);
  if (!(near < far && near > 0.0)) return {miss, {}};
  if (near == z.near) return {near, {0.0, 0.0, d.z < 0.0 ? 1.0 : -1.0}};
  return {near, {(o.x + near * d.x) / radius, (o.y + near * d.y) / radius, 0.0}};
}

// A sphere is a capsule as high as it is wide.
Hit enter_capsule(const Vector& o, const Vector& d, double radius, double height) {
  const double low = radius, high = height - radius;
  double near = inside_tube(o, d, radius).near;
  const double side = o.z + near * d.z;
  if (!(near > 0.0 && side > low && side < high)) near = miss;
  for (const double centre : {low, high}) {
    const Vector from{o.x, o.y, o.z - centre};
    const double t = inside(dot(d, d), dot(from, d), dot(from, from) - radius * radius).near;
    if (t > 0.0) near = std::min(near, t);
  }
  if (near == miss) return {miss, {}};
  const Vector p = o + near * d;
  const double axis = std::min(std::max(p.z, low), high);
  return {near, {p.x / radius, p.y / radius, (p.z - axis) / radius}};
}

FASTDIS_INLINE Hit enter(const Shapes3dGeometry& body, const Vector& o, const Vector& d) {
  // Most rays pass even the sphere about the object, made a little larger than need be so that rounding is no matter.
  const double middle = body.height / 2.0, wide = body.shape == 0.0 ? 2.0 : 1.0;
  const Vector from{o.x, o.y, o.z - middle};
  const double b = dot(from, d), c = dot(from, from) - 1.001 * (wide * body.radius * body.radius + middle * middle);
  if (c > 0.0 && (b > 0.0 || b * b < dot(d, d) * c)) return {miss, {}};
  if (body.shape == 0.0) return enter_box(o, d, body.radius, body.height);
  if (body.shape == 1.0) return enter_cylinder(o, d, body.radius, body.height);
  return enter_capsule(o, d, body.radius, body.height);
}

struct Sample {
  Surface surface;
  double light;  // from 0 to 1
};

FASTDIS_INLINE Sample cast(const Shapes3dScene& scene, const Shapes3dGeometry& body, const Vector& o, const Vector& d) {
  Surface surface = on_object;
  Hit hit = enter(body, o, d);
  if (hit.t == miss) {
    const double floor = d.z < 0.0 ? -o.z / d.z : miss;
    const double back = d.y > 0.0 ? (scene.room - o.y) / d.y : miss;
    const double side = ((d.x < 0.0 ? -scene.room : scene.room) - o.x) / d.x;
    surface = on_wall;
    if (floor <= back && floor <= side) {
      surface = on_floor;
      hit = {floor, {0.0, 0.0, 1.0}};
    } else if (back <= side) {
      hit = {back, {0.0, -1.0, 0.0}};
    } else {
      hit = {side, {d.x < 0.0 ? 1.0 : -1.0, 0.0, 0.0}};
    }
  }
  const Vector light{scene.light[0], scene.light[1], scene.light[2]};
  const double facing = dot(hit.normal, light);
  // All objects are convex, so that none of them casts a shadow on itself.
  const bool lit = facing > 0.0 && (surface == on_object || enter(body, o + hit.t * d, light).t == miss);
  return {surface, lit ? scene.ambient + (1.0 - scene.ambient) * facing : scene.ambient};
}

void render(const Shapes3dScene& scene, const Shapes3dGeometry& body, int64_t size, int64_t samples,
            uint16_t* weights) {
  const double c = body.cosine, s = body.sine, drop = scene.target - scene.height;
  const double length = std::sqrt(scene.distance * scene.distance + drop * drop);
  const double level = scene.distance / length, down = drop / length;
  const Vector camera{scene.distance * s, -scene.distance * c, scene.height};
  const Vector forward{-level * s, level * c, down}, right{c, s, 0.0}, up{s * down, -c * down, level};
  const double step = 2.0 * scene.tangent / static_cast<double>(size * samples);
  const int64_t rays = samples * samples, pixels = size * size;

  for (int64_t row = 0, pixel = 0; row < size; ++row) {
    for (int64_t column = 0; column < size; ++column, ++pixel) {
      int64_t sum[surfaces] = {};
      for (int64_t i = row * samples; i < (row + 1) * samples; ++i) {
        const Vector ahead = (scene.tangent - (static_cast<double>(i) + 0.5) * step) * up;
        for (int64_t j = column * samples; j < (column + 1) * samples; ++j) {
          const double u = (static_cast<double>(j) + 0.5) * step - scene.tangent;
          const Sample sample = cast(scene, body, camera, forward + u * right + ahead);
          // Whole numbers, whose sum does not depend on its order.
          sum[sample.surface] += static_cast<int64_t>(sample.light * 65535.0 + 0.5);
        }
      }
      for (int k = 0; k < surfaces; ++k)
        weights[k * pixels + pixel] = static_cast<uint16_t>((sum[k] + rays / 2) / rays);
    }
  }
}

// Weights of one geometry with each pixel's repeated for its channels, so that images are made without shuffling.
struct Spread {
  template <class Isa>
  FASTDIS_INLINE static void run(const uint16_t* weights, int64_t n, uint16_t* spread) {
    for (int64_t i = 0; i < n; ++i) spread[3 * i] = spread[3 * i + 1] = spread[3 * i + 2] = weights[i];
  }
};

// The colours of the channels repeat after `period` bytes, which whole vectors fill at every instruction-set level.
constexpr int64_t period = 96;

struct Color {
  template <class Isa>
  FASTDIS_INLINE static void run(const uint16_t* floor, const uint16_t* wall, const uint16_t* object,
                                 const uint16_t (*colors)[period], int64_t n, uint8_t* image) {
    const auto part = [](uint16_t weight, uint16_t color) FASTDIS_INLINE_LAMBDA {
      return static_cast<uint16_t>(static_cast<uint32_t>(weight) * color >> 16);
    };
    for (int64_t start = 0; start < n; start += period) {
      const int64_t end = std::min(period, n - start);
#pragma omp simd
      for (int64_t i = 0; i < end; ++i) {
        const uint16_t level = part(floor[start + i], colors[0][i]) + part(wall[start + i], colors[1][i]) +
                               part(object[start + i], colors[2][i]);
        image[start + i] = static_cast<uint8_t>(static_cast<uint16_t>(level + 128) >> 8);
      }
    }
  }
};

}  // namespace

void shapes3d_weights(const Shapes3dScene& scene, const Shapes3dGeometry* geometries, int64_t count, int64_t size,
                      int64_t samples, uint16_t* weights, int threads) {
  parallel_ranges(count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      render(scene, geometries[g], size, samples, weights + g * surfaces * size * size);
  });
}

void shapes3d_images(const uint16_t* weights, const uint16_t* colors, int64_t geometries, int64_t colorings,
                     int64_t pixels, uint8_t* images, int threads) {
  const int64_t n = pixels * channels;
  parallel_ranges(geometries * colorings, std::max<int64_t>(colorings, 8), threads, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> spread(surfaces * n);
    uint16_t repeated[surfaces][period];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / colorings, coloring = i % colorings;
      if (i == begin || coloring == 0)
        multiversion<Spread>(weights + g * surfaces * pixels, surfaces * pixels, spread.data());
      for (int k = 0; k < surfaces; ++k)
        for (int64_t j = 0; j < period; ++j)
          repeated[k][j] = colors[(coloring * surfaces + k) * channels + j % channels];
      multiversion<Color>(spread.data(), spread.data() + n, spread.data() + 2 * n, repeated, n,
                          images + (coloring * geometries + g) * n);
    }
  });
}

}  // namespace fastdis::host
