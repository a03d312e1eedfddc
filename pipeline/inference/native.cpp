// BlockDrop on CPU cores in fp32: sums of a few pixels and output channels in registers.
// Output channels are computed in groups: of two vectors while so many are left, then of one vector, then
// (pruned blocks) of a half, then of four channels. Weights are packed as [ky, kx, in][group], group after
// group. Uses GCC's and Clang's vector extensions.

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

constexpr int HALF = LANES > 4 ? LANES / 2 : 4;

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

// Which rows of which convolution, and whether what `out` holds is added.
struct Part {
  const Conv& c;
  const Image &in, &out;
  int from, to;
  bool add;
};

// out = relu(conv(in)), or relu(out + conv(in)) in place, for the group of output channels from o on.
template <int T, int V, int L, int CIN, int S>
void conv_rows(const Part& p, int o) {
  const Image &in = p.in, &out = p.out;
  const int cin = CIN ? CIN : p.c.in_channels, cout = p.c.out_channels;
  const float *w = static_cast<const float*>(p.c.weight) + (int64_t)o * 9 * cin, *bias = p.c.bias + o;
  for (int y = p.from; y < p.to; ++y) {
    const float* src = in.data + y * S * in.row();
    float* dst = out.at(y, 0) + o;
    int x = 0;
    for (; x + T <= out.width; x += T)
      tile<T, V, L, CIN, S>(src + x * S * cin, in.row(), cin, w, bias, dst + x * cout, cout, p.add);
    for (; x + 4 <= out.width; x += 4)
      tile<4, V, L, CIN, S>(src + x * S * cin, in.row(), cin, w, bias, dst + x * cout, cout, p.add);
    for (; x < out.width; ++x)
      tile<1, V, L, CIN, S>(src + x * S * cin, in.row(), cin, w, bias, dst + x * cout, cout, p.add);
  }
}

// A group of V * L output channels; returns the first channel after it.
template <int T, int V, int L>
int conv_group(const Part& p, int o) {
  if (p.c.stride == 2) conv_rows<T, V, L, 0, 2>(p, o);
  else switch (p.c.in_channels) {  // the usual numbers of channels, known when compiled
      case 3: conv_rows<T, V, L, 3, 1>(p, o); break;
      default: conv_rows<T, V, L, 0, 1>(p, o);
    }
  return o + V * L;
}

struct Fp32 {
  typedef float Value;
  static constexpr int INPUT_CHANNELS = 3;

  static float to_float(float value) { return value; }
  static float from_float(float value) { return value; }
  static void conv(const Team& team, const Conv& c, const Image& in, const Image& out, bool add) {
    const Part p{c, in, out, team.from(out.height), team.to(out.height), add};
    for (int o = 0; o < c.out_channels;) {
      const int left = c.out_channels - o;
      if (left >= 2 * LANES) o = conv_group<WIDE_TILE, 2, LANES>(p, o);
      else if (left >= LANES) o = conv_group<TILE, 1, LANES>(p, o);
      else if (left >= HALF) o = conv_group<TILE, 1, HALF>(p, o);
      else o = conv_group<TILE, 1, 4>(p, o);
    }
  }
};

}  // namespace

extern "C" {

int32_t lanes() { return LANES; }

void* make_space(const Job* job) { return new TeamSpace<Fp32>(*job); }

void free_space(void* space) { delete static_cast<TeamSpace<Fp32>*>(space); }

void run(const Job* job, void* const* spaces, int32_t worker) { run_share<Fp32>(*job, spaces, worker); }
}
