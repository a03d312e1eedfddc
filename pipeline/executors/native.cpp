// BlockDrop on CPU cores, fp32: one image at a time through the policy network and the blocks that it
// keeps. An image's activations stay in the core's cache, so a dropped block costs nothing and a kept one
// needs neither gather nor scatter; images of one batch may all have policies of their own.
//
// Activations are [H + 2, W + 2, C] with a border of zeros, so that no convolution has edges to treat.
// Weights are packed by pipeline/executors/native.py as [out / block][ky, kx, in][block].
// Compiled there, for the machine that it runs on, with GCC's or Clang's vector extensions.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#define INLINE inline __attribute__((always_inline))

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

extern "C" {

struct Conv {  // 3x3, padding 1, batch norm folded in
  const float* weight;
  const float* bias;
  int32_t in_channels, out_channels, stride, block;  // block: output channels packed together
};

struct Network {
  const Conv* convs;  // the stem, then two for each block
  const float* fc_weight;  // [outputs, C]
  const float* fc_bias;
  int32_t num_blocks, outputs;
};

struct Job {
  const Network* resnet;
  const Network* policy_net;  // null: the actions are given
  const uint8_t* images;  // [B, H, W, 3], to be normalised; or null
  const float* inputs;  // [B, H, W, 3], normalised; or null
  const float* scale;  // [3]: pixel * scale + shift is the networks' input
  const float* shift;
  uint8_t* actions;  // [B, K], read or written
  float* logits;  // [B, N]
  int64_t batch;
  int32_t height, width, policy_size;  // policy_size: side of what the policy network sees
  int32_t teams, team_size;
  int64_t* next_image;  // shared by the teams: images differ in cost, so whoever is free takes one
  int32_t* barriers;  // [teams, 2]: arrived, generation
};
}

namespace {

// Workers that share one image. A team of one never waits.
struct Team {
  int rank, size;
  std::atomic<int32_t>*arrived, *generation;

  void wait() const {
    if (size == 1) return;
    const int32_t mine = generation->load(std::memory_order_acquire);
    if (arrived->fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived->store(0, std::memory_order_relaxed);
      generation->store(mine + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation->load(std::memory_order_acquire) == mine; ++spins)
      if (spins > 2000) std::this_thread::yield();
  }
  int from(int rows) const { return rows * rank / size; }
  int to(int rows) const { return rows * (rank + 1) / size; }
};

struct Image {  // activations with their border
  float* data;
  int height, width, channels;
  int row() const { return (width + 2) * channels; }
  float* at(int y, int x) const { return data + (y + 1) * row() + (x + 1) * channels; }
};

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
    const float* w = c.weight + (int64_t)o * 9 * cin;
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

void conv(const Team& team, const Conv& c, const Image& in, const Image& out, bool add) {
  const int from = team.from(out.height), to = team.to(out.height);
  if (c.block == 2 * LANES) conv_by_input<WIDE_TILE, 2, LANES>(c, in, out, from, to, add);
  else if (c.block == LANES) conv_by_input<TILE, 1, LANES>(c, in, out, from, to, add);
  else conv_by_input<TILE, 1, 4>(c, in, out, from, to, add);
  team.wait();
}

// The shortcut where the shape changes: 2x2 averages, then channels of zeros.
void pool_and_pad(const Team& team, const Image& in, const Image& out) {
  for (int y = team.from(out.height); y < team.to(out.height); ++y)
    for (int x = 0; x < out.width; ++x) {
      const float *above = in.at(2 * y, 2 * x), *below = in.at(2 * y + 1, 2 * x);
      float* to = out.at(y, x);
      for (int c = 0; c < in.channels; ++c)
        to[c] = 0.25f * (above[c] + above[in.channels + c] + below[c] + below[in.channels + c]);
      std::fill(to + in.channels, to + out.channels, 0.f);
    }
  team.wait();
}

// One network's activations: for each of its stages the stream and what lies between two convolutions.
struct Workspace {
  std::vector<float> memory;
  std::vector<Image> streams, hidden;

  Workspace(const Network& net, int height, int width) {
    std::vector<int> channels{net.convs[0].out_channels};
    for (int b = 0; b < net.num_blocks; ++b)
      if (net.convs[1 + 2 * b].stride == 2) channels.push_back(net.convs[1 + 2 * b].out_channels);
    int64_t total = 0;
    std::vector<int64_t> offsets;
    for (int round = 0, h = height, w = width; round < (int)channels.size(); ++round, h /= 2, w /= 2)
      for (auto* images : {&streams, &hidden}) {
        images->push_back({nullptr, h, w, channels[round]});
        offsets.push_back(total);
        total += ((int64_t)(h + 2) * (w + 2) * channels[round] + LANES) & ~(int64_t)15;
      }
    memory.assign(total, 0.f);
    for (size_t i = 0; i < streams.size(); ++i) {
      streams[i].data = memory.data() + offsets[2 * i];
      hidden[i].data = memory.data() + offsets[2 * i + 1];
    }
  }
};

void forward(const Team& team, const Network& net, const Workspace& space, const Image& input,
             const uint8_t* actions, float* outputs) {
  int stage = 0;
  conv(team, net.convs[0], input, space.streams[0], false);
  for (int b = 0; b < net.num_blocks; ++b) {
    const Conv &first = net.convs[1 + 2 * b], &second = net.convs[2 + 2 * b];
    const Image from = space.streams[stage];
    if (first.stride == 2) pool_and_pad(team, from, space.streams[++stage]);
    if (actions && !actions[b]) continue;
    conv(team, first, from, space.hidden[stage], false);
    conv(team, second, space.hidden[stage], space.streams[stage], true);
  }
  if (team.rank == 0) {
    const Image& last = space.streams[stage];
    std::vector<float> means(last.channels, 0.f);
    for (int y = 0; y < last.height; ++y)
      for (int x = 0; x < last.width; ++x)
        for (int c = 0; c < last.channels; ++c) means[c] += last.at(y, x)[c];
    for (float& mean : means) mean /= last.height * last.width;
    for (int n = 0; n < net.outputs; ++n) {
      float sum = net.fc_bias[n];
      for (int c = 0; c < last.channels; ++c) sum += net.fc_weight[n * last.channels + c] * means[c];
      outputs[n] = sum;
    }
  }
  team.wait();
}

void read_input(const Team& team, const Job& job, int64_t image, const Image& out) {
  const int64_t offset = image * job.height * job.width * 3;
  for (int y = team.from(out.height); y < team.to(out.height); ++y) {
    float* to = out.at(y, 0);
    const int64_t row = offset + (int64_t)y * out.width * 3;
    if (job.inputs)
      std::copy_n(job.inputs + row, out.width * 3, to);
    else
      for (int i = 0; i < out.width * 3; ++i)
        to[i] = job.images[row + i] * job.scale[i % 3] + job.shift[i % 3];
  }
  team.wait();
}

// Averages over areas, as torch's adaptive_avg_pool2d has it.
void average_down(const Team& team, const Image& in, const Image& out) {
  for (int y = team.from(out.height); y < team.to(out.height); ++y)
    for (int x = 0; x < out.width; ++x) {
      const int top = y * in.height / out.height, left = x * in.width / out.width;
      const int bottom = ((y + 1) * in.height + out.height - 1) / out.height;
      const int right = ((x + 1) * in.width + out.width - 1) / out.width;
      for (int c = 0; c < 3; ++c) {
        float sum = 0.f;
        for (int i = top; i < bottom; ++i)
          for (int j = left; j < right; ++j) sum += in.at(i, j)[c];
        out.at(y, x)[c] = sum / ((bottom - top) * (right - left));
      }
    }
  team.wait();
}

// What the members of one team share.
struct TeamSpace {
  std::vector<float> pixels, small_pixels;
  Image input, small;
  Workspace resnet, policy_net;
  std::vector<float> policy_logits;
  int64_t image = 0;

  explicit TeamSpace(const Job& job)
      : pixels((job.height + 2) * (job.width + 2) * 3, 0.f),
        small_pixels((job.policy_size + 2) * (job.policy_size + 2) * 3, 0.f),
        input{pixels.data(), job.height, job.width, 3},
        small{small_pixels.data(), job.policy_size, job.policy_size, 3},
        resnet(*job.resnet, job.height, job.width),
        policy_net(job.policy_net ? *job.policy_net : *job.resnet, job.policy_size, job.policy_size),
        policy_logits(job.resnet->num_blocks) {}
};

void run_image(const Team& team, const Job& job, TeamSpace& space) {
  const int num_blocks = job.resnet->num_blocks;
  uint8_t* actions = job.actions + space.image * num_blocks;
  read_input(team, job, space.image, space.input);
  if (job.policy_net) {
    const bool whole = job.policy_size == job.height;
    if (!whole) average_down(team, space.input, space.small);
    forward(team, *job.policy_net, space.policy_net, whole ? space.input : space.small, nullptr,
            space.policy_logits.data());
    if (team.rank == 0)  // a probability of at least 0.5 is a logit of at least 0
      for (int k = 0; k < num_blocks; ++k) actions[k] = space.policy_logits[k] >= 0.f;
    team.wait();
  }
  forward(team, *job.resnet, space.resnet, space.input, actions,
          job.logits + space.image * job.resnet->outputs);
}

}  // namespace

extern "C" {

int32_t lanes() { return LANES; }

void* make_space(const Job* job) { return new TeamSpace(*job); }

void free_space(void* space) { delete static_cast<TeamSpace*>(space); }

// One worker's share of a job, called once by every worker; spaces: one for each team.
void run(const Job* job, void* const* spaces, int32_t worker) {
  const int number = worker / job->team_size;
  auto* barrier = reinterpret_cast<std::atomic<int32_t>*>(job->barriers + 2 * number);
  const Team team{worker % job->team_size, job->team_size, barrier, barrier + 1};
  TeamSpace& space = *static_cast<TeamSpace*>(spaces[number]);
  auto* next = reinterpret_cast<std::atomic<int64_t>*>(job->next_image);
  for (;;) {
    if (team.rank == 0) space.image = next->fetch_add(1);
    team.wait();
    if (space.image >= job->batch) return;
    run_image(team, *job, space);
  }
}
}
