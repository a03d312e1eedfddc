// BlockDrop on CPU cores in bf16: activations and weights are bf16, sums are fp32. The products are
// those of AMX (matrices of 16 rows of 64 bytes), or of AVX512_BF16 where there is no AMX.
//
// A convolution is a product of matrices. A row of the left one is what an output sees of one row of
// pixels. In memory that is one run of 3 * C inputs, so the matrix is never built: its rows are read
// where they lie, and overlap.
// Weights are packed as [columns / 16][ky][run / 2][16][2], runs zero-padded to multiples of DEPTH.

#include <immintrin.h>

#include <cstring>
#include <utility>

#include "native_common.hpp"

#if !defined(__AVX512BF16__)  // nothing to do it with

extern "C" {
int32_t depth() { return 0; }
void* make_space(const Job*) { return nullptr; }
void free_space(void*) {}
void run(const Job*, void* const*, int32_t) {}
}

#else

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define WITH_AMX
constexpr int DEPTH = 32;  // inputs of one product
#else
constexpr int DEPTH = 2;
#endif

namespace {

typedef uint16_t Bf16;
typedef ImageOf<Bf16> Image;
constexpr int COLUMNS = 16;  // output channels of one product

// 16 outputs: bf16 in memory, fp32 in a register.
INLINE __m512 read(const Bf16* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

INLINE void write_relu(__m512 sum, Bf16* to) {
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_max_ps(sum, _mm512_setzero_ps()));
  _mm256_storeu_si256((__m256i*)to, (__m256i)rounded);
}

#if defined(WITH_AMX)

// AMX is slow where a row of the left matrix doesn't begin with a cache line. Therefore, if a pixel is
// shorter than one (C = 16), a row serves `block` = 2 neighbouring outputs: the run has the inputs of
// both, the right matrix has 2 * C columns, with zeros where an output does not look.
constexpr int ROWS = 16;  // of a tile of sums
constexpr int MOST_TILES = 5;  // that share one read of the weights
constexpr int AHEAD = 4;  // matrices of weights to fetch early: ResNet-110's don't fit the second cache

// The left matrix of some tiles: where each begins, and how far apart rows and rows of pixels are.
struct Left {
  const Bf16* tiles[MOST_TILES];
  int64_t stride, pixel_row;
  bool first;  // of their convolution, so that no weight is in a near cache yet
};

// Tile registers are named by constants: 0 to 4 for sums, 6 and 7 for the matrices.
template <int T>
INLINE void load(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(T) : "memory");
}

template <int T>
INLINE void store(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(T) : "memory");
}

template <int T>
INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm7, %%tmm6, %%tmm%c0" ::"i"(T));
}

// sums[t] = left[t] * weights + bias; all rows of the bias' tile are the same 16 numbers. `meanwhile` is
// other work: a share of it is done at each step, while the matrix unit is busy.
template <int... T, class Work>
INLINE void multiply(std::integer_sequence<int, T...>, const Left& left, const Bf16* weights, int steps,
                     const float* bias, float* sums, Work& meanwhile) {
  (load<T>(bias, 0), ...);
  for (int ky = 0; ky < 3; ++ky)
    for (int step = 0; step < steps; ++step) {
      const int64_t offset = ky * left.pixel_row + step * DEPTH;
      load<7>(weights, 64);
      if (left.first)
#pragma GCC unroll 16
        for (int row = 0; row < 16; ++row) _mm_prefetch(weights + (AHEAD * 16 + row) * 32, _MM_HINT_T0);
      weights += DEPTH * COLUMNS;
      ((load<6>(left.tiles[T] + offset, left.stride * sizeof(Bf16)), multiply_add<T>()), ...);
      meanwhile.share(3 * steps);
    }
  (store<T>(sums + T * ROWS * COLUMNS, 64), ...);
}

// A thread's tile registers, while this lives.
struct TileRegisters {
  TileRegisters() {
    alignas(64) uint8_t config[64] = {1};  // palette 1; then bytes a row and rows of each register
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;
      config[48 + t] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
};

// Linux keeps tile registers from processes that have not asked for them.
bool permitted() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Where the sums of some tiles belong, and what of them has yet to be finished.
template <bool ADD>
struct Sums {
  static constexpr int PART = 8;  // rows

  alignas(64) float values[MOST_TILES * ROWS * COLUMNS];
  Bf16* to[MOST_TILES];
  int rows[MOST_TILES];
  int64_t stride;
  int next = 0, end = 0;  // parts

  // out = relu(sums), or relu(out + sums), rounded.
  INLINE void row(const float* from, Bf16* out) {
    __m512 sum = _mm512_load_ps(from);
    if (ADD) sum += read(out);
    write_relu(sum, out);
  }
  INLINE void part() {
    const int tile = next * PART / ROWS, first = next * PART % ROWS;
    const float* from = values + next * PART * COLUMNS;
    Bf16* out = to[tile] + first * stride;
    if (rows[tile] >= first + PART)
#pragma GCC unroll 8
      for (int r = 0; r < PART; ++r) row(from + r * COLUMNS, out + r * stride);
    else
      for (int r = 0; r < rows[tile] - first; ++r) row(from + r * COLUMNS, out + r * stride);
    ++next;
  }
  // Finish one of `shares` shares.
  INLINE void share(int shares) {
    for (int done = 0; next < end && done * shares < end; ++done) part();
  }
};

// Which outputs a tile has: 16 times `block` pixels of a run. A run is a row of pixels, or all rows and
// the borders between them if that makes fewer tiles.
struct Plan {
  int tiles, run_tiles, run_rows;  // all; of one run; rows of the matrix that a run has
};

Plan plan(const Conv& c, const Image& out, int rows) {
  const auto parts = [](int size, int part) { return (size + part - 1) / part; };
  const int across = parts(out.width, c.block), all = parts(rows * (out.width + 2) - 2, c.block);
  if (c.stride == 1 && parts(all, ROWS) < rows * parts(across, ROWS))
    return {parts(all, ROWS), parts(all, ROWS), all};
  return {rows * parts(across, ROWS), parts(across, ROWS), across};
}

// N tiles by 16 columns; the tiles before them are finished meanwhile.
template <int N, bool ADD>
void some_tiles(const Conv& c, const Image& in, const Image& out, int top, const Plan& p, int tile,
                int column, Sums<ADD>& sums, Sums<ADD>& before) {
  const int steps = ((c.stride * (c.block - 1) + 3) * in.channels + DEPTH - 1) / DEPTH;
  Left left{{}, (int64_t)c.stride * c.block * in.channels, in.row(), tile == 0};
  sums.stride = (int64_t)c.block * out.channels;
  for (int t = 0; t < N; ++t) {
    const int y = top + (tile + t) / p.run_tiles, row = (tile + t) % p.run_tiles * ROWS;
    left.tiles[t] = in.data + y * c.stride * in.row() + row * left.stride;
    sums.to[t] = out.at(y, 0) + row * sums.stride + column;
    sums.rows[t] = std::min(ROWS, p.run_rows - row);
  }
  const Bf16* weights = static_cast<const Bf16*>(c.weight) + (int64_t)column * 3 * steps * DEPTH;
  const auto tiles = std::make_integer_sequence<int, N>();
  multiply(tiles, left, weights, steps, c.bias + column, sums.values, before);
  sums.next = 0;
  sums.end = N * ROWS / Sums<ADD>::PART;
}

template <bool ADD>
void conv_rows(const Conv& c, const Image& in, const Image& out, int from, int to) {
  const Plan p = plan(c, out, to - from);
  Sums<ADD> pair[2], *sums = pair, *before = pair + 1;
  for (int tile = 0, count; tile < p.tiles; tile += count) {
    count = p.tiles - tile == MOST_TILES ? MOST_TILES : std::min(p.tiles - tile, MOST_TILES - 1);
    for (int column = 0; column < c.block * out.channels; column += COLUMNS) {
      switch (count) {
        case 1: some_tiles<1>(c, in, out, from, p, tile, column, *sums, *before); break;
        case 2: some_tiles<2>(c, in, out, from, p, tile, column, *sums, *before); break;
        case 3: some_tiles<3>(c, in, out, from, p, tile, column, *sums, *before); break;
        case 4: some_tiles<4>(c, in, out, from, p, tile, column, *sums, *before); break;
        default: some_tiles<5>(c, in, out, from, p, tile, column, *sums, *before);
      }
      std::swap(sums, before);
    }
  }
  before->share(1);
  if (p.run_tiles == p.tiles || out.width % c.block)  // borders between rows were written
    for (int y = from; y < to; ++y) {
      std::fill_n(out.at(y, -1), out.channels, Bf16{});
      std::fill_n(out.at(y, out.width), out.channels, Bf16{});
    }
}

#else

// T pixels of a row by V * 16 output channels, all sums in registers. `pixel`: inputs from one output's
// run to the next one's; `pairs`: of inputs in a run.
template <int T, int V>
INLINE void tile(const Bf16* in, int64_t in_row, int pixel, int pairs, const Bf16* weights,
                 const float* bias, Bf16* out, int out_channels, bool add) {
  const int64_t group = (int64_t)3 * pairs * 2 * COLUMNS;  // from 16 output channels to the next ones
  __m512 sums[T][V];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sums[t][v] = _mm512_loadu_ps(bias + v * COLUMNS);
      if (add) sums[t][v] += read(out + t * out_channels + v * COLUMNS);
    }
  for (int ky = 0; ky < 3; ++ky) {
    const Bf16* from = in + ky * in_row;
    for (int i = 0; i < pairs; ++i, from += 2, weights += 2 * COLUMNS) {
      __m512bh w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) w[v] = (__m512bh)_mm512_loadu_si512(weights + v * group);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        int32_t pair;
        memcpy(&pair, from + t * pixel, sizeof(pair));
        const __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[t][v] = _mm512_dpbf16_ps(sums[t][v], inputs, w[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) write_relu(sums[t][v], out + t * out_channels + v * COLUMNS);
}

// V * 16 output channels of some rows, from channel `column` on.
template <int T, int V>
void conv_columns(const Conv& c, const Image& in, const Image& out, int from, int to, bool add, int column) {
  const int pixel = c.stride * in.channels, pairs = 3 * in.channels / 2;
  const Bf16* weights = static_cast<const Bf16*>(c.weight) + (int64_t)column * 3 * pairs * 2;
  const float* bias = c.bias + column;
  const auto some = [&](auto count, int y, int x) {
    tile<count, V>(in.data + y * c.stride * in.row() + x * pixel, in.row(), pixel, pairs, weights, bias,
                   out.at(y, x) + column, out.channels, add);
  };
  for (int y = from; y < to; ++y) {
    int x = 0;
    for (; x + T <= out.width; x += T) some(std::integral_constant<int, T>(), y, x);
    for (; x + 4 <= out.width; x += 4) some(std::integral_constant<int, 4>(), y, x);
    for (; x < out.width; ++x) some(std::integral_constant<int, 1>(), y, x);
  }
}

template <bool ADD>
void conv_rows(const Conv& c, const Image& in, const Image& out, int from, int to) {
  int column = 0;
  for (; column + 2 * COLUMNS <= out.channels; column += 2 * COLUMNS)
    conv_columns<8, 2>(c, in, out, from, to, ADD, column);
  if (column < out.channels) conv_columns<16, 1>(c, in, out, from, to, ADD, column);
}

struct TileRegisters {
  TileRegisters() {}
};

bool permitted() { return true; }

#endif

struct Bf16Kernel {
  typedef Bf16 Value;
  static constexpr int INPUT_CHANNELS = 8;  // five of them zeros

  static float to_float(Bf16 value) {
    const uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, sizeof(found));
    return found;
  }
  static Bf16 from_float(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  static void conv(const Team& team, const Conv& c, const Image& in, const Image& out, bool add) {
    const int from = team.from(out.height), to = team.to(out.height);
    if (from == to) return;
    if (add) conv_rows<true>(c, in, out, from, to);
    else conv_rows<false>(c, in, out, from, to);
  }
};

}  // namespace

extern "C" {

// Inputs of one product, which weights are packed for; 0: this CPU has none, or the system hides it.
int32_t depth() { return permitted() ? DEPTH : 0; }

void* make_space(const Job* job) { return new TeamSpace<Bf16Kernel>(*job); }

void free_space(void* space) { delete static_cast<TeamSpace<Bf16Kernel>*>(space); }

void run(const Job* job, void* const* spaces, int32_t worker) {
  const TileRegisters registers;
  run_share<Bf16Kernel>(*job, spaces, worker);
}
}

#endif
