// Norm, activation and rotary embedding. `*_stride` counts elements between rows.
#pragma once

#include "numbers.h"

namespace {

template <class T>
void rmsnorm_(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t width,
              int64_t x_stride, int64_t residual_stride, int64_t out_stride, float eps) {
  thread_local std::vector<float> sums;
  sums.resize(width);
  float* sum = sums.data();
  for (int64_t row = 0; row < rows; ++row) {
    const T* in = x + row * x_stride;
    T* to = out + row * out_stride;
    float squares = 0.0f;
    if (residual) {
      T* rest = residual + row * residual_stride;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) {
        float value = load(in + i) + load(rest + i);
        sum[i] = value;
        store(rest + i, value);
        squares += value * value;
      }
    } else {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) {
        float value = load(in + i);
        sum[i] = value;
        squares += value * value;
      }
    }
    float scale = 1.0f / std::sqrt(squares / float(width) + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(to + i, sum[i] * scale * load(weight + i));
  }
}

template <class T>
void silu_and_mul_(const T* x, T* out, int64_t rows, int64_t width, int64_t x_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* gate = x + row * x_stride;
    const T* up = gate + width;
    T* to = out + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      float g = load(gate + i);
      float small = exp_(-std::fabs(g));
      float sigmoid = (g >= 0.0f ? 1.0f : small) / (1.0f + small);
      store(to + i, g * sigmoid * load(up + i));
    }
  }
}

template <class T, class C>
void rotate_(T* x, const C* cos, int64_t heads, int64_t head_dim, int64_t half, bool neox) {
  const C* sin = cos + half;
  for (int64_t head = 0; head < heads; ++head) {
    T* at = x + head * head_dim;
    if (neox) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        float a = load(at + i), b = load(at + half + i), c = load(cos + i), s = load(sin + i);
        store(at + i, a * c - b * s);
        store(at + half + i, b * c + a * s);
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        float a = load(at + 2 * i), b = load(at + 2 * i + 1), c = load(cos + i), s = load(sin + i);
        store(at + 2 * i, a * c - b * s);
        store(at + 2 * i + 1, b * c + a * s);
      }
    }
  }
}

template <class T, class C>
void rotary_(T* q, T* k, const C* table, int64_t longest, const int64_t* positions,
             int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t head_dim, int64_t rotary_dim,
             int64_t q_stride, int64_t k_stride, bool neox) {
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t position = std::min(std::max<int64_t>(positions[token], 0), longest - 1);
    const C* cos = table + position * rotary_dim;
    rotate_(q + token * q_stride, cos, q_heads, head_dim, rotary_dim / 2, neox);
    rotate_(k + token * k_stride, cos, k_heads, head_dim, rotary_dim / 2, neox);
  }
}

}  // namespace
