// What native.cpp (fp32) and native_bf16.cpp share: an image at a time through the policy network and
// the blocks that it keeps. An image's activations stay in the core's cache, so a dropped block costs
// nothing and a kept one needs neither gather nor scatter; images of one batch may all have policies of
// their own.
//
// Activations are [H + 2, W + 2, C] with a border of zeros, so that no convolution has edges to treat.
// pipeline/inference/native.py packs the weights and compiles this for the machine that it runs on.
//
// A Kernel has the type of an activation, Value; to_float and from_float; INPUT_CHANNELS, how many an
// image has in memory; and conv(team, conv, in, out, add), which does a team member's share of
// out = relu(conv(in)), or of relu(out + conv(in)).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define INLINE inline __attribute__((always_inline))

extern "C" {

struct Conv {  // 3x3, padding 1, batch norm folded in
  const void* weight;
  const float* bias;
  int32_t in_channels, out_channels, stride, block;  // block: as the kernel packs weights
};

struct Network {
  const Conv* convs;  // the stem, then two for each block
  const float* fc_weight;  // [outputs, C]
  const float* fc_bias;
  int32_t num_blocks, outputs;
};

struct Values {  // of paths, for a policy network that classifies: PathValues in models/path_values.py
  const uint8_t* mask;  // [P, K]
  const float *weight, *bias, *costs;  // [P, 3 + N], [P], [P]
  const float *gamma, *temperature, *resnet_temperature, *own_share;  // one number each
  int32_t paths, answers;  // P; answers: without a block the policy network's own class stands
};

struct Job {
  const Network* resnet;
  const Network* policy_net;  // null: the actions are given
  const Values* values;  // null: the policy network gives a logit for each block
  const uint8_t* images;  // [B, H, W, 3], to be normalised; or null
  const float* inputs;  // [B, H, W, 3], normalised; or null
  const float* scale;  // [3]: pixel * scale + shift is the networks' input
  const float* shift;
  uint8_t* actions;  // [B, V, K], read or, where the policy network decides and V = 1, written
  float* logits;  // [B, V, N]
  int64_t batch;
  int32_t decides;  // whether the policy network writes the actions
  int32_t policies;  // V: under how many an image runs; what they have in common at first runs once
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

template <class Value>
struct ImageOf {  // activations with their border
  Value* data;
  int height, width, channels;
  int row() const { return (width + 2) * channels; }
  Value* at(int y, int x) const { return data + (y + 1) * row() + (x + 1) * channels; }
};

// Memory for images, zeros at first; borders stay so. Every image begins with a cache line, and a kernel
// may read SPARE pixels further than the last one.
template <class Value>
class Memory {
 public:
  explicit Memory(const std::vector<ImageOf<Value>*>& images) {
    int64_t total = LINE, channels = 0;
    for (auto* image : images) {
      total += lines(*image);
      channels = std::max<int64_t>(channels, image->channels);
    }
    values_.assign(total + SPARE * channels, Value{});
    const int64_t behind = reinterpret_cast<uintptr_t>(values_.data()) % 64 / sizeof(Value);
    Value* next = values_.data() + (LINE - behind) % LINE;
    for (auto* image : images) {
      image->data = next;
      next += lines(*image);
    }
  }

 private:
  static constexpr int64_t LINE = 64 / sizeof(Value), SPARE = 96;

  static int64_t lines(const ImageOf<Value>& image) {
    return ((int64_t)(image.height + 2) * image.row() + LINE - 1) / LINE * LINE;
  }
  std::vector<Value> values_;
};

// One network's activations: for each of its stages the stream, and what lies between two convolutions of
// its blocks. Blocks of a stage share that memory if they have as many channels there (pruned ones may
// not): then its border, which depends on them, stays zero. And streams as they were where policies part,
// `forks` at most that are all yet to be gone back to.
template <class Value>
struct Workspace {
  std::vector<ImageOf<Value>> streams, hidden;
  std::vector<int> hidden_of;  // [K], which of `hidden` a block uses
  Memory<Value> memory;
  std::vector<std::vector<Value>> kept;

  Workspace(const Network& net, int height, int width, int forks)
      : streams(stages(net, height, width)), memory(all(net)) {
    int64_t most = 0;
    for (const auto& stream : streams) most = std::max(most, (int64_t)(stream.height + 2) * stream.row());
    kept.assign(forks, std::vector<Value>(most));
  }

  static std::vector<ImageOf<Value>> stages(const Network& net, int height, int width) {
    std::vector<ImageOf<Value>> found{{nullptr, height, width, net.convs[0].out_channels}};
    for (int b = 0; b < net.num_blocks; ++b) {
      const Conv &first = net.convs[1 + 2 * b], &second = net.convs[2 + 2 * b];
      if (first.stride == 2) found.push_back({nullptr, height /= 2, width /= 2, second.out_channels});
    }
    return found;
  }
  std::vector<ImageOf<Value>*> all(const Network& net) {
    std::vector<int> stage_of;  // of each in `hidden`
    for (int b = 0, stage = 0; b < net.num_blocks; ++b) {
      const Conv& first = net.convs[1 + 2 * b];
      if (first.stride == 2) ++stage;
      size_t i = 0;
      while (i < hidden.size() && (stage_of[i] != stage || hidden[i].channels != first.out_channels)) ++i;
      if (i == hidden.size()) {
        hidden.push_back({nullptr, streams[stage].height, streams[stage].width, first.out_channels});
        stage_of.push_back(stage);
      }
      hidden_of.push_back(i);
    }
    std::vector<ImageOf<Value>*> found;
    for (size_t stage = 0, i = 0; stage < streams.size(); ++stage) {  // a stage's memory lies together
      found.push_back(&streams[stage]);
      for (; i < hidden.size() && stage_of[i] == (int)stage; ++i) found.push_back(&hidden[i]);
    }
    return found;
  }
};

// The shortcut where the shape changes: 2x2 averages, then channels of zeros.
template <class Kernel, class Image>
void pool_and_pad(const Team& team, const Image& in, const Image& out) {
  for (int y = team.from(out.height); y < team.to(out.height); ++y)
    for (int x = 0; x < out.width; ++x) {
      const auto *above = in.at(2 * y, 2 * x), *below = in.at(2 * y + 1, 2 * x);
      const auto *above_right = above + in.channels, *below_right = below + in.channels;
      auto* to = out.at(y, x);
      for (int c = 0; c < in.channels; ++c)
        to[c] = Kernel::from_float(
            0.25f * (Kernel::to_float(above[c]) + Kernel::to_float(above_right[c]) +
                     Kernel::to_float(below[c]) + Kernel::to_float(below_right[c])));
      std::fill(to + in.channels, to + out.channels, typename Kernel::Value{});
    }
  team.wait();
}

// The last layer: means over the pixels, then a linear map, both in fp32.
template <class Kernel, class Image>
void head(const Network& net, const Image& last, float* outputs) {
  std::vector<float> means(last.channels, 0.f);
  for (int y = 0; y < last.height; ++y)
    for (int x = 0; x < last.width; ++x) {
      const auto* pixel = last.at(y, x);
      for (int c = 0; c < last.channels; ++c) means[c] += Kernel::to_float(pixel[c]);
    }
  for (float& mean : means) mean /= last.height * last.width;
  for (int n = 0; n < net.outputs; ++n) {
    float sum = net.fc_bias[n];
    for (int c = 0; c < last.channels; ++c) sum += net.fc_weight[n * last.channels + c] * means[c];
    outputs[n] = sum;
  }
}

// A member's share of copying a stream to, or back from, where it is kept.
template <class Value>
void keep(const Team& team, const ImageOf<Value>& stream, std::vector<Value>& kept, bool back) {
  const int rows = stream.height + 2, from = team.from(rows), to = team.to(rows);
  Value *here = stream.data + from * stream.row(), *there = kept.data() + from * stream.row();
  std::copy_n(back ? there : here, (int64_t)(to - from) * stream.row(), back ? here : there);
  team.wait();
}

// Blocks from `block` on, for policies that were the same until there: those that keep a block part from
// those that drop it, and these go on from the stream as it was. Null actions: every block runs.
template <class Kernel>
void run_blocks(const Team& team, const Network& net, Workspace<typename Kernel::Value>& space,
                int block, int stage, int fork, std::vector<int> policies, const uint8_t* actions,
                float* outputs) {
  for (int b = block; b < net.num_blocks; ++b) {
    const Conv &first = net.convs[1 + 2 * b], &second = net.convs[2 + 2 * b];
    const auto from = space.streams[stage];
    if (first.stride == 2) pool_and_pad<Kernel>(team, from, space.streams[++stage]);
    const auto drop = std::partition(policies.begin(), policies.end(), [&](int policy) {
      return !actions || actions[(int64_t)policy * net.num_blocks + b];
    });
    if (drop == policies.begin()) continue;
    const bool part = drop != policies.end();
    if (part) keep(team, space.streams[stage], space.kept[fork], false);
    const auto& hidden = space.hidden[space.hidden_of[b]];
    Kernel::conv(team, first, from, hidden, false);
    team.wait();
    Kernel::conv(team, second, hidden, space.streams[stage], true);
    team.wait();
    if (!part) continue;
    run_blocks<Kernel>(team, net, space, b + 1, stage, fork + 1, {policies.begin(), drop}, actions, outputs);
    policies.erase(policies.begin(), drop);
    keep(team, space.streams[stage], space.kept[fork], true);
  }
  if (team.rank == 0) {
    float* found = outputs + (int64_t)policies[0] * net.outputs;
    head<Kernel>(net, space.streams[stage], found);
    for (size_t i = 1; i < policies.size(); ++i)
      std::copy_n(found, net.outputs, outputs + (int64_t)policies[i] * net.outputs);
  }
  team.wait();
}

template <class Kernel, class Image>
void forward(const Team& team, const Network& net, Workspace<typename Kernel::Value>& space,
             const Image& input, const std::vector<int>& policies, const uint8_t* actions, float* outputs) {
  Kernel::conv(team, net.convs[0], input, space.streams[0], false);
  team.wait();
  run_blocks<Kernel>(team, net, space, 0, 0, 0, policies, actions, outputs);
}

// Logits [N] to log probabilities, in place.
inline void log_softmax(float* logits, int size, float temperature) {
  for (int n = 0; n < size; ++n) logits[n] /= temperature;
  const float largest = *std::max_element(logits, logits + size);
  float sum = 0.f;
  for (int n = 0; n < size; ++n) sum += std::exp(logits[n] - largest);
  for (int n = 0; n < size; ++n) logits[n] -= largest + std::log(sum);
}

// The path with the largest expected reward by Eq. 3, of the policy network's log probabilities [N]; of
// equal ones the first.
inline int best_path(const Values& values, const float* log_probs, int classes) {
  const int likeliest = std::max_element(log_probs, log_probs + classes) - log_probs;
  float second = -INFINITY, entropy = 0.f;
  for (int n = 0; n < classes; ++n) {
    if (n != likeliest) second = std::max(second, log_probs[n]);
    entropy -= std::exp(log_probs[n]) * log_probs[n];
  }
  const float first = std::min(log_probs[likeliest], -1e-6f);  // a probability of 1 has infinite odds
  const float log_odds = first - std::log1p(-std::exp(first)), lead = log_probs[likeliest] - second;
  int best = 0;
  float highest = -INFINITY;
  for (int path = 0; path < values.paths; ++path) {
    const float* w = values.weight + path * (3 + classes);
    const float logit = w[0] * log_odds + w[1] * lead + w[2] * entropy + w[3 + likeliest] + values.bias[path];
    const float correct = 1 / (1 + std::exp(-logit)), cost = values.costs[path];
    const float reward = correct * (1 - cost * cost) - (1 - correct) * *values.gamma;
    if (reward > highest) highest = reward, best = path;
  }
  return best;
}

template <class Kernel, class Image>
void read_input(const Team& team, const Job& job, int64_t image, const Image& out) {
  const int64_t offset = image * job.height * job.width * 3;
  for (int y = team.from(out.height); y < team.to(out.height); ++y) {
    const int64_t row = offset + (int64_t)y * out.width * 3;
    auto* to = out.at(y, 0);
    for (int x = 0; x < out.width; ++x)
      for (int c = 0; c < 3; ++c) {
        const int64_t i = row + x * 3 + c;
        const float value = job.inputs ? job.inputs[i] : job.images[i] * job.scale[c] + job.shift[c];
        to[x * Kernel::INPUT_CHANNELS + c] = Kernel::from_float(value);
      }
  }
  team.wait();
}

// Averages over areas, as torch's adaptive_avg_pool2d has it.
template <class Kernel, class Image>
void average_down(const Team& team, const Image& in, const Image& out) {
  for (int y = team.from(out.height); y < team.to(out.height); ++y)
    for (int x = 0; x < out.width; ++x) {
      const int top = y * in.height / out.height, left = x * in.width / out.width;
      const int bottom = ((y + 1) * in.height + out.height - 1) / out.height;
      const int right = ((x + 1) * in.width + out.width - 1) / out.width;
      for (int c = 0; c < 3; ++c) {
        float sum = 0.f;
        for (int i = top; i < bottom; ++i)
          for (int j = left; j < right; ++j) sum += Kernel::to_float(in.at(i, j)[c]);
        out.at(y, x)[c] = Kernel::from_float(sum / ((bottom - top) * (right - left)));
      }
    }
  team.wait();
}

// What the members of one team share.
template <class Kernel>
struct TeamSpace {
  typedef typename Kernel::Value Value;
  ImageOf<Value> input, small;
  Memory<Value> memory;
  Workspace<Value> resnet, policy_net;
  std::vector<float> policy_logits;  // of blocks, or of classes
  int64_t image = 0;

  explicit TeamSpace(const Job& job)
      : input{nullptr, job.height, job.width, Kernel::INPUT_CHANNELS},
        small{nullptr, job.policy_size, job.policy_size, Kernel::INPUT_CHANNELS},
        memory({&input, &small}),
        resnet(*job.resnet, job.height, job.width, std::min(job.policies - 1, job.resnet->num_blocks)),
        policy_net(job.policy_net ? *job.policy_net : *job.resnet, job.policy_size, job.policy_size, 0),
        policy_logits(job.policy_net ? job.policy_net->outputs : 0) {}
};

template <class Kernel>
void run_image(const Team& team, const Job& job, TeamSpace<Kernel>& space) {
  const int num_blocks = job.resnet->num_blocks, classes = job.resnet->outputs;
  const Values* values = job.values;
  float* of_policy = space.policy_logits.data();
  uint8_t* actions = job.actions + space.image * job.policies * num_blocks;
  float* logits = job.logits + space.image * job.policies * classes;
  read_input<Kernel>(team, job, space.image, space.input);
  if (job.policy_net) {
    const bool whole = job.policy_size == job.height;
    if (!whole) average_down<Kernel>(team, space.input, space.small);
    forward<Kernel>(team, *job.policy_net, space.policy_net, whole ? space.input : space.small, {0}, nullptr,
                    of_policy);
    if (team.rank == 0) {
      if (values) log_softmax(of_policy, classes, *values->temperature);
      if (job.decides && values)
        std::copy_n(values->mask + best_path(*values, of_policy, classes) * num_blocks, num_blocks, actions);
      else if (job.decides)  // a probability of at least 0.5 is a logit of at least 0
        for (int k = 0; k < num_blocks; ++k) actions[k] = of_policy[k] >= 0.f;
    }
    team.wait();
  }
  std::vector<int> with_resnet;  // the policies for which it runs
  for (int policy = 0; policy < job.policies; ++policy) {
    const uint8_t* kept = actions + policy * num_blocks;
    if (!values || !values->answers || std::any_of(kept, kept + num_blocks, [](uint8_t k) { return k; }))
      with_resnet.push_back(policy);
    else if (team.rank == 0)
      std::copy_n(of_policy, classes, logits + policy * classes);
  }
  if (with_resnet.empty()) return;
  forward<Kernel>(team, *job.resnet, space.resnet, space.input, with_resnet, actions, logits);
  if (!values || team.rank) return;
  for (const int policy : with_resnet) {  // both networks' answers, averaged
    float* both = logits + policy * classes;
    log_softmax(both, classes, *values->resnet_temperature);
    for (int n = 0; n < classes; ++n)
      both[n] = *values->own_share * of_policy[n] + (1 - *values->own_share) * both[n];
  }
}

// One worker's share of a job, called once by every worker; spaces: one for each team.
template <class Kernel>
void run_share(const Job& job, void* const* spaces, int32_t worker) {
  const int number = worker / job.team_size;
  auto* barrier = reinterpret_cast<std::atomic<int32_t>*>(job.barriers + 2 * number);
  const Team team{worker % job.team_size, job.team_size, barrier, barrier + 1};
  TeamSpace<Kernel>& space = *static_cast<TeamSpace<Kernel>*>(spaces[number]);
  auto* next = reinterpret_cast<std::atomic<int64_t>*>(job.next_image);
  for (;;) {
    if (team.rank == 0) space.image = next->fetch_add(1);
    team.wait();
    if (space.image >= job.batch) return;
    run_image<Kernel>(team, job, space);
  }
}

}  // namespace
