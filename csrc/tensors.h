// Tensors as the kernels take them: checked before memory is touched, with a message for each mistake.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>

#include "cpu/kernels.h"

namespace bidora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kNormFloor = 1e-18;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be fp64, fp32, bf16 or fp16");
  return Dtype::f32;
}

inline void check_cpu(const Tensor& t, const char* name) { STD_TORCH_CHECK(t.is_cpu(), name, " must be on cpu"); }

// The number of rows of a tensor [..., columns]
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// [rows, columns] with contiguous rows, or a contiguous [..., columns] of so many rows
inline Matrix matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_cpu(t, name);
  STD_TORCH_CHECK(t.numel() == 0 || t.const_data_ptr() != nullptr, name, " has no memory any more");
  if (t.dim() > 2 && t.size(t.dim() - 1) == columns && t.numel() == rows * columns && t.is_contiguous())
    return {const_cast<void*>(t.const_data_ptr()), columns, dtype_of(t, name)};
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be [", rows, ", ", columns, "], got a tensor of ",
      t.dim(), " dimensions and ", t.numel(), " elements");
  if (rows == 0) return {const_cast<void*>(t.const_data_ptr()), columns, dtype_of(t, name)};
  STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, name, " must have contiguous rows, got stride ", t.stride(1));
  STD_TORCH_CHECK(rows <= 1 || t.stride(0) >= columns, name, " must have rows that do not overlap, got stride ", t.stride(0));
  return {const_cast<void*>(t.const_data_ptr()), rows <= 1 ? columns : t.stride(0), dtype_of(t, name)};
}

// A contiguous tensor of the accumulating type with this many elements
template <typename T>
T* values(const Tensor& t, const char* name, int64_t count) {
  check_cpu(t, name);
  STD_TORCH_CHECK(dtype_of(t, name) == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32), name, " must be ", sizeof(T) == 8 ? "fp64" : "fp32");
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

template <typename T>
T* values(const std::optional<Tensor>& t, const char* name, int64_t count) {
  return t.has_value() ? values<T>(*t, name, count) : nullptr;
}

// Uninitialized memory on the boundary of a cache line: a vector as long as a line would else touch two
constexpr std::align_val_t kLine{64};
struct Free {
  void operator()(void* p) const { ::operator delete(p, kLine); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kLine)));
}

template <typename T>
int64_t panel_count(int64_t columns) {
  return (columns + kernels<T>().panel - 1) / kernels<T>().panel;
}

// How many items of `cost` multiply-adds make a piece of work worth a thread
inline int64_t grain(int64_t cost) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cost)); }

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

}  // namespace bidora
