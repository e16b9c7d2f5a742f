// Coloured 3D shapes: a room with one object in it, ray-cast once for each geometry and coloured many times.

#pragma once

#include <cstdint>

namespace fastdis::host {

// Lengths in the units of the room, whose floor is z = 0 and whose walls are y = room, behind, and x = -room, room.
// The camera stands `distance` from the axis of the object and looks at the point `target` above its foot.
struct Shapes3dScene {
  double room, distance, height, target;
  double tangent;   // of half the angle of view
  double light[3];  // unit vector to the light, which is as far away as the sun
  double ambient;   // share of the light that reaches every point
};

// What does not change with the colours. The object stands on the floor at the origin; the camera is turned about it.
struct Shapes3dGeometry {
  double shape;  // 0 cube, 1 cylinder, 2 sphere, 3 capsule: as in the labels of 3D Shapes
  double radius, height;
  double cosine, sine;  // of the azimuth
};

// weights [geometries, 3, size * size]: what the floor, the wall and the object give to a pixel, 65535 for a pixel that
// one of them fills in full light. A pixel is the mean of samples * samples rays.
void shapes3d_weights(const Shapes3dScene& scene, const Shapes3dGeometry* geometries, int64_t count, int64_t size,
                      int64_t samples, uint16_t* weights, int threads);

// images [colorings, geometries, pixels, 3] of colors [colorings, 3 surfaces, 3 channels], 255 * 256 for a full
// channel. An image is (sum of the surfaces' weight * color >> 16, plus 128) >> 8, in whole numbers: the same
// everywhere.
void shapes3d_images(const uint16_t* weights, const uint16_t* colors, int64_t geometries, int64_t colorings,
                     int64_t pixels, uint8_t* images, int threads);

}  // namespace fastdis::host
