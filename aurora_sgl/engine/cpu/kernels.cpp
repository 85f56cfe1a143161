// What a decoding step needs, compiled for the machine that runs it.
//
// Plain C++ behind a C interface, so that neither torch's headers nor its ABI are needed and a
// build takes seconds. Pointers come from contiguous rows of torch tensors; `*_stride` counts
// elements between rows. `kind` is 0 for float32 and 1 for bfloat16. All arithmetic is float32.
// native.py compiles, caches and calls this; its tests compare every function with PyTorch.

#include <omp.h>

#include "attention.h"
#include "layer.h"
#include "linear.h"
#include "small.h"

extern "C" {

void aurora_rmsnorm(int kind, const void* x, void* residual, const void* weight, void* out,
                    int64_t rows, int64_t width, int64_t x_stride, int64_t residual_stride,
                    int64_t out_stride, float eps) {
  if (kind == 0)
    rmsnorm_((const float*)x, (float*)residual, (const float*)weight, (float*)out, rows, width,
             x_stride, residual_stride, out_stride, eps);
  else
    rmsnorm_((const bf16*)x, (bf16*)residual, (const bf16*)weight, (bf16*)out, rows, width,
             x_stride, residual_stride, out_stride, eps);
}

void aurora_silu_and_mul(int kind, const void* x, void* out, int64_t rows, int64_t width,
                         int64_t x_stride) {
  if (kind == 0)
    silu_and_mul_((const float*)x, (float*)out, rows, width, x_stride);
  else
    silu_and_mul_((const bf16*)x, (bf16*)out, rows, width, x_stride);
}

void aurora_rotary(int kind, int table_kind, void* q, void* k, const void* table,
                   int64_t longest, const int64_t* positions, int64_t tokens, int64_t q_heads, int64_t k_heads,
                   int64_t head_dim, int64_t rotary_dim, int64_t q_stride, int64_t k_stride,
                   int neox) {
#define AURORA_ROTARY(T, C)                                                                     \
  rotary_((T*)q, (T*)k, (const C*)table, longest, positions, tokens, q_heads, k_heads, head_dim,\
          rotary_dim, q_stride, k_stride, neox != 0)
  if (kind == 0 && table_kind == 0) AURORA_ROTARY(float, float);
  if (kind == 0 && table_kind == 1) AURORA_ROTARY(float, bf16);
  if (kind == 1 && table_kind == 0) AURORA_ROTARY(bf16, float);
  if (kind == 1 && table_kind == 1) AURORA_ROTARY(bf16, bf16);
#undef AURORA_ROTARY
}

void aurora_attention(int kind, const Plan* plan, const void* q, void* o, const void* k_buffer,
                      const void* v_buffer, int64_t heads, int64_t kv_heads, int64_t dim,
                      int64_t value_dim, int64_t q_stride, int64_t o_stride, float scale,
                      float cap) {
  const Shape shape{heads, kv_heads, dim, value_dim, q_stride, o_stride, scale, cap};
  if (kind == 0)
    attention_(*plan, shape, (const float*)q, (float*)o, (const float*)k_buffer,
               (const float*)v_buffer);
  else
    attention_(*plan, shape, (const bf16*)q, (bf16*)o, (const bf16*)k_buffer,
               (const bf16*)v_buffer);
}

void aurora_linear(int kind, const void* x, int64_t x_stride, const void* w, const void* bias,
                   void* y, int64_t y_stride, int64_t rows, int64_t in, int64_t outs) {
  linear(kind, x, x_stride, w, bias, y, y_stride, rows, in, outs);
}

// x: [rows, hidden]; residual: the same, or x itself in the first layer, updated; out: [rows,
// hidden], may be x where residual is not; embedded: [rows, hidden] in a drafter's layer, else null.
void aurora_layer(const Layer* layer, const Plan* plan, const int64_t* positions,
                  const int64_t* slots, int64_t count, void* x, void* residual, void* out,
                  const void* embedded) {
  const Rows rows{positions, slots, count};
#define AURORA_LAYER(T, C) \
  layer_<T, C>(*layer, *plan, rows, (T*)x, (T*)residual, (T*)out, (const T*)embedded)
  if (layer->kind == 0 && layer->angles_kind == 0) AURORA_LAYER(float, float);
  if (layer->kind == 0 && layer->angles_kind == 1) AURORA_LAYER(float, bf16);
  if (layer->kind == 1 && layer->angles_kind == 0) AURORA_LAYER(bf16, float);
  if (layer->kind == 1 && layer->angles_kind == 1) AURORA_LAYER(bf16, bf16);
#undef AURORA_LAYER
}

// Layers one after the other. x, residual, out as above for the first of them; the others work on
// what it left in residual and out.
void aurora_layers(const Layer* const* layers, int64_t many, const Plan* plan,
                   const int64_t* positions, const int64_t* slots, int64_t count, void* x,
                   void* residual, void* out) {
  for (int64_t at = 0; at < many; ++at)
    aurora_layer(layers[at], plan, positions, slots, count, at ? out : x, residual, out, nullptr);
}

// How bfloat16 weights are multiplied: 2 by the processor's own instruction, 1 widened to float32.
int aurora_bfloat16() {
#if defined(__AVX512BF16__)
  return 2;
#else
  return 1;
#endif
}

// Sets the number of threads of later calls from this thread; returns what it was.
int aurora_threads(int many) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(many);
  return before;
}

int aurora_version() { return 4; }
}
