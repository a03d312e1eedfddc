// BlockDrop on CPU cores in fp32: sums of a few pixels and output channels in registers.
// Weights are packed as [out / block][ky, kx, in][block]. Uses GCC's and Clang's vector extensions.

#include "native_common.hpp"

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats of one register
constexpr int WIDE_TILE = 8, TILE = 16;  // pixels whose sums fill the registers: two vectors each, one
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int WIDE_TILE = 4, TILE = 8;
#else
constexpr int LANES = 4;
constexpr int WIDE_TILE = 8, TILE = 16;
#endif

template <int N>
struct VectorOf {
  typedef float type __attribute__((vector_size(N * sizeof(float)), aligned(4), may_alias));
};

namespace {

typedef ImageOf<float> Image;

// T pixels of a row by V * L output channels, all sums in registers. The three taps of a kernel row are
// one run of 3 * C inputs in memory.
template <int T, int V, int L, int CIN, int S>
INLINE void tile(const float* in, int in_row, int channels, const float* w, const float* bias, float* out,
                 int out_channels, bool add) {
  typedef typename VectorOf<L>::type Vec;
  const int cin = CIN ? CIN : channels;
  Vec sums[T][V];
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[t][v] = *(const Vec*)(bias + v * L);
      if (add) sums[t][v] += *(const Vec*)(out + t * out_channels + v * L);
    }
  for (int ky = 0; ky < 3; ++ky) {
    const float* p = in + ky * in_row;
    for (int i = 0; i < 3 * cin; ++i) {
      Vec wv[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) wv[v] = *(const Vec*)(w + v * L);
      w += V * L;
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) {
        const float x = p[t * S * cin + i];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[t][v] += x * wv[v];
      }
    }
  }
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec s = sums[t][v];
      *(Vec*)(out + t * out_channels + v * L) = s > 0 ? s : Vec{};
    }
}

// out = relu(conv(in)), or relu(out + conv(in)) in place, for some of the rows.
template <int T, int V, int L, int CIN, int S>
void conv_rows(const Conv& c, const Image& in, const Image& out, int from, int to, bool add) {
  const int cin = CIN ? CIN : c.in_channels, cout = c.out_channels;
  for (int o = 0; o < cout; o += V * L) {
    const float* w = static_cast<const float*>(c.weight) + (int64_t)o * 9 * cin;
    for (int y = from; y < to; ++y) {
      const float* src = in.data + y * S * in.row();
      float* dst = out.at(y, 0) + o;
      int x = 0;
      for (; x + T <= out.width; x += T)
        tile<T, V, L, CIN, S>(src + x * S * cin, in.row(), cin, w, c.bias + o, dst + x * cout, cout, add);
      for (; x + 4 <= out.width; x += 4)
        tile<4, V, L, CIN, S>(src + x * S * cin, in.row(), cin, w, c.bias + o, dst + x * cout, cout, add);
      for (; x < out.width; ++x)
        tile<1, V, L, CIN, S>(src + x * S * cin, in.row(), cin, w, c.bias + o, dst + x * cout, cout, add);
    }
  }
}

template <int T, int V, int L>
void conv_by_input(const Conv& c, const Image& in, const Image& out, int from, int to, bool add) {
  if (c.stride == 1) switch (c.in_channels) {  // the usual numbers of channels, known when compiled
      case 3: return conv_rows<T, V, L, 3, 1>(c, in, out, from, to, add);
      case 16: return conv_rows<T, V, L, 16, 1>(c, in, out, from, to, add);
      case 32: return conv_rows<T, V, L, 32, 1>(c, in, out, from, to, add);
      case 64: return conv_rows<T, V, L, 64, 1>(c, in, out, from, to, add);
      default: return conv_rows<T, V, L, 0, 1>(c, in, out, from, to, add);
    }
  conv_rows<T, V, L, 0, 2>(c, in, out, from, to, add);
}

struct Fp32 {
  typedef float Value;
  static constexpr int INPUT_CHANNELS = 3;

  static float to_float(float value) { return value; }
  static float from_float(float value) { return value; }
  static void conv(const Team& team, const Conv& c, const Image& in, const Image& out, bool add) {
    const int from = team.from(out.height), to = team.to(out.height);
    if (c.block == 2 * LANES) conv_by_input<WIDE_TILE, 2, LANES>(c, in, out, from, to, add);
    else if (c.block == LANES) conv_by_input<TILE, 1, LANES>(c, in, out, from, to, add);
    else conv_by_input<TILE, 1, 4>(c, in, out, from, to, add);
  }
};

}  // namespace

extern "C" {

int32_t lanes() { return LANES; }

void* make_space(const Job* job) { return new TeamSpace<Fp32>(*job); }

void free_space(void* space) { delete static_cast<TeamSpace<Fp32>*>(space); }

void run(const Job* job, void* const* spaces, int32_t worker) { run_share<Fp32>(*job, spaces, worker); }
}
