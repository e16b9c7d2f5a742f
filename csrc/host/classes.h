// Values of factors as classes, and rows by class.

#pragma once

#include <cstdint>
#include <vector>

namespace fastdis::host {

// Numbers the values of one factor, value i at factor[i * stride], from 0 in rising order. Returns these values.
std::vector<int64_t> dense_classes(const int64_t* factor, int64_t stride, int64_t n, int32_t* classes /* [n] */);

// Rows of equal class, one class after the other, each in rising order: those of class c become rows[starts[c]] to
// rows[starts[c + 1]]. classes [n] holds 0 to size - 1, and n < 2^32; throws std::out_of_range where one does not.
void group_rows(const int32_t* classes, int64_t n, int32_t size, uint32_t* rows /* [n] */,
                int64_t* starts /* [size + 1] */);

}  // namespace fastdis::host
