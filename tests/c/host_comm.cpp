// Tensor parallelism with the caller's own collectives: two ranks are two threads, their
// collectives are copies through shared memory. The four column/row x SP cases against the
// unsharded linear: bit for bit where the same products are summed, dX to rounding where it is
// reduced. Once with collectives that finish at once, once with ones that `wait` finishes.

#include "check.h"

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int RANKS = 2, TOKENS = 6, OUT = 10, IN = 8;

// Nobody passes before all have come; reusable.
class Barrier {
  public:
    void arrive_and_wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const long generation = generation_;
        if (++arrived_ == RANKS) {
            arrived_ = 0;
            generation_++;
            all_came_.notify_all();
        } else {
            all_came_.wait(lock, [&] { return generation_ != generation; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable all_came_;
    int arrived_ = 0;
    long generation_ = 0;
};

// What the ranks of one communicator share.
struct Group {
    Barrier barrier;
    const float *send[RANKS] = {};
};

// One rank's end of it. With `deferred`, an operation starts when it is called and is done by wait.
struct Rank {
    Group *group;
    int rank;
    bool deferred;
    std::vector<std::function<void()>> started;
    int waits = 0;

    int32_t submit(std::function<void()> operation) {
        if (deferred) {
            started.push_back(std::move(operation));
        } else {
            operation();
        }
        return 0;
    }

    // Shows `mine` to the other ranks while `read` looks at theirs.
    void exchange(const float *mine, const std::function<void()> &read) {
        group->send[rank] = mine;
        group->barrier.arrive_and_wait();
        read();
        group->barrier.arrive_and_wait();
    }
};

int32_t all_gather(void *user, const void *send, void *recv, uint64_t count, uint32_t dtype) {
    auto *self = static_cast<Rank *>(user);
    if (dtype != FORGE_DTYPE_F32) {
        return 1;
    }
    return self->submit([=] {
        self->exchange(static_cast<const float *>(send), [=] {
            for (int r = 0; r < RANKS; r++) {
                std::memcpy(static_cast<float *>(recv) + static_cast<size_t>(r) * count,
                            self->group->send[r], count * sizeof(float));
            }
        });
    });
}

int32_t reduce_scatter(void *user, const void *send, void *recv, uint64_t count, uint32_t dtype) {
    auto *self = static_cast<Rank *>(user);
    if (dtype != FORGE_DTYPE_F32) {
        return 1;
    }
    return self->submit([=] {
        self->exchange(static_cast<const float *>(send), [=] {
            const size_t first = static_cast<size_t>(self->rank) * count;
            for (size_t i = 0; i < count; i++) {
                float sum = 0.0f;
                for (int r = 0; r < RANKS; r++) {
                    sum += self->group->send[r][first + i];
                }
                static_cast<float *>(recv)[i] = sum;
            }
        });
    });
}

int32_t all_reduce(void *user, void *buffer, uint64_t count, uint32_t dtype) {
    auto *self = static_cast<Rank *>(user);
    if (dtype != FORGE_DTYPE_F32) {
        return 1;
    }
    return self->submit([=] {
        std::vector<float> sum(count, 0.0f);
        self->exchange(static_cast<const float *>(buffer), [&] {
            for (int r = 0; r < RANKS; r++) {
                for (size_t i = 0; i < count; i++) {
                    sum[i] += self->group->send[r][i];
                }
            }
        });
        // Only now has every rank read this one's.
        std::memcpy(buffer, sum.data(), count * sizeof(float));
    });
}

int32_t wait(void *user) {
    auto *self = static_cast<Rank *>(user);
    self->waits++;
    for (const auto &operation : self->started) {
        operation();
    }
    self->started.clear();
    return 0;
}

struct ContextDelete {
    void operator()(forge_context *c) const { forge_context_free(c); }
};
struct CommDelete {
    void operator()(forge_comm *c) const { forge_comm_free(c); }
};
struct LinearDelete {
    void operator()(forge_linear *l) const { forge_linear_free(l); }
};
using Context = std::unique_ptr<forge_context, ContextDelete>;
using Communicator = std::unique_ptr<forge_comm, CommDelete>;
using Linear = std::unique_ptr<forge_linear, LinearDelete>;

struct Case {
    const char *name;
    forge_parallel parallel;
    bool sequence_parallel;
    forge_weight_format weight_format;
};

Linear make_linear(forge_context *context, forge_comm *comm, const Case &c) {
    forge_linear_config config{};
    config.struct_size = sizeof config;
    config.factor_dtype = FORGE_DTYPE_F32;
    config.out_features = OUT;
    config.in_features = IN;
    config.parallel = c.parallel;
    config.sequence_parallel = c.sequence_parallel;
    config.reduce_dgrad = 1;
    config.weight_format = c.weight_format;
    // The draws of stochastic rounding go by the element's place in the whole W, so that shards
    // round like the whole.
    config.weight_rounding = FORGE_ROUNDING_STOCHASTIC;
    config.parameter_id = 11;
    config.rule = "lion";
    forge_linear *linear = nullptr;
    OK(forge_linear_new(context, comm, &config, &linear));
    return Linear(linear);
}

// Rows and columns [r0, r1) x [c0, c1) of a row-major matrix.
std::vector<float> cut(const std::vector<float> &a, size_t cols, size_t r0, size_t r1, size_t c0,
                       size_t c1) {
    std::vector<float> out;
    for (size_t r = r0; r < r1; r++) {
        out.insert(out.end(), a.begin() + static_cast<std::ptrdiff_t>(r * cols + c0),
                   a.begin() + static_cast<std::ptrdiff_t>(r * cols + c1));
    }
    return out;
}

struct Problem {
    std::vector<float> weight, dy, x;
};

struct Result {
    forge_layout layout;
    std::vector<float> weight, momentum, dx, dbias;
};

forge_const_buffer readable(const std::vector<float> &v, size_t from = 0) {
    return {v.data() + from, (v.size() - from) * sizeof(float)};
}

forge_buffer writable(std::vector<float> &v) { return {v.data(), v.size() * sizeof(float)}; }

// Two steps of one rank, of whatever part of W and of the tokens its linear has.
Result train(forge_linear *linear, const Case &c, int rank, const Problem &problem) {
    Result result{};
    forge_layout &layout = result.layout;
    layout.struct_size = sizeof layout;
    OK(forge_linear_layout(linear, &layout));
    const size_t r0 = layout.row_offset, r1 = r0 + layout.out_local;
    const size_t c0 = layout.col_offset, c1 = c0 + layout.in_local;

    std::vector<char> weight(layout.weight.bytes), momentum(layout.states[0].bytes);
    forge_parameter parameter{};
    parameter.struct_size = sizeof parameter;
    parameter.weight = {weight.data(), weight.size()};
    parameter.states[0] = {momentum.data(), momentum.size()};
    const auto shard = cut(problem.weight, IN, r0, r1, c0, c1);
    OK(forge_linear_import_weight(linear, &parameter, readable(shard), nullptr));

    // Tokens of this rank between the layers, of the factor that SP shares out.
    const bool column = c.parallel == FORGE_PARALLEL_COLUMN, row = c.parallel == FORGE_PARALLEL_ROW;
    const size_t share = TOKENS / RANKS, t0 = static_cast<size_t>(rank) * share;
    const bool part_of_x = c.sequence_parallel && column, part_of_dy = c.sequence_parallel && row;
    const auto x_part = cut(problem.x, IN, t0, t0 + share, c0, c1);
    const auto dy_part = cut(problem.dy, OUT, t0, t0 + share, r0, r1);
    result.dx.resize((part_of_x ? share : TOKENS) * layout.in_local);
    result.dbias.resize(layout.out_local);

    uint64_t workspace_bytes = 0;
    OK(forge_linear_workspace(linear, FORGE_BACKWARD_UPDATE, TOKENS, &workspace_bytes));
    std::vector<float> workspace((workspace_bytes + 3) / 4);

    forge_step step{};
    step.struct_size = sizeof step;
    step.scalars.seed = 99;
    step.scalars.grad_scale = 1.0;
    step.scalars.hyper[FORGE_HYPER_LR] = 0.01;
    step.scalars.hyper[FORGE_HYPER_WEIGHT_DECAY] = 0.1;
    step.scalars.hyper[2] = 0.9;
    step.scalars.hyper[3] = 0.99;

    forge_backward backward{};
    backward.struct_size = sizeof backward;
    backward.mode = FORGE_BACKWARD_UPDATE;
    backward.tokens = TOKENS;
    // A shard's columns of a whole factor need no copy: a stride does it.
    backward.dy = part_of_dy ? readable(dy_part) : readable(problem.dy, r0);
    backward.dy_stride = part_of_dy ? 0 : OUT;
    backward.x = part_of_x ? readable(x_part) : readable(problem.x, c0);
    backward.x_stride = part_of_x ? 0 : IN;
    backward.dx = writable(result.dx);
    backward.dbias = writable(result.dbias);
    backward.workspace = writable(workspace);
    backward.parameter = &parameter;
    backward.step = &step;
    for (step.scalars.step = 1; step.scalars.step <= 2; step.scalars.step++) {
        forge_report report{};
        report.struct_size = sizeof report;
        OK(forge_linear_backward(linear, &backward, &report, nullptr));
        REQUIRE(report.tiles > 0 && report.nonfinite_tiles == 0);
    }

    result.weight.resize(layout.out_local * layout.in_local);
    result.momentum.resize(result.weight.size());
    OK(forge_linear_export_weight(linear, &parameter, writable(result.weight), nullptr));
    OK(forge_linear_export_state(linear, &parameter, 0, writable(result.momentum), nullptr));
    return result;
}

double largest_difference(const std::vector<float> &a, const std::vector<float> &b) {
    REQUIRE(a.size() == b.size());
    double largest = 0.0;
    for (size_t i = 0; i < a.size(); i++) {
        const double difference = std::fabs(static_cast<double>(a[i]) - b[i]);
        if (!(difference <= largest)) {
            largest = difference; // a NaN comes here, too
        }
    }
    return largest;
}

void compare(forge_context *context, const Case &c, bool deferred, const Problem &problem) {
    forge_comm *solo = nullptr;
    OK(forge_comm_new_solo(context, &solo));
    const Communicator solo_owner(solo);
    const Case unsharded = {"unsharded", FORGE_PARALLEL_NONE, false, c.weight_format};
    const Result whole = train(make_linear(context, solo, unsharded).get(), unsharded, 0, problem);

    Group group;
    Result results[RANKS];
    int waits[RANKS] = {};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < RANKS; rank++) {
        threads.emplace_back([&, rank] {
            Rank self{&group, rank, deferred, {}, 0};
            forge_host_collectives collectives{};
            collectives.struct_size = sizeof collectives;
            collectives.user = &self;
            collectives.all_gather = all_gather;
            collectives.reduce_scatter = reduce_scatter;
            collectives.all_reduce = all_reduce;
            collectives.wait = deferred ? wait : nullptr;
            forge_comm *comm = nullptr;
            OK(forge_comm_new_host(context, static_cast<uint32_t>(rank), RANKS, &collectives,
                                   &comm));
            const Communicator comm_owner(comm);
            const Linear linear = make_linear(context, comm, c);
            results[rank] = train(linear.get(), c, rank, problem);
            waits[rank] = self.waits;
            REQUIRE(self.started.empty());
        });
    }
    for (auto &thread : threads) {
        thread.join();
    }

    double dx_difference = 0.0;
    for (int rank = 0; rank < RANKS; rank++) {
        const Result &r = results[rank];
        const size_t r0 = r.layout.row_offset, r1 = r0 + r.layout.out_local;
        const size_t c0 = r.layout.col_offset, c1 = c0 + r.layout.in_local;
        REQUIRE(r.weight == cut(whole.weight, IN, r0, r1, c0, c1));
        REQUIRE(r.momentum == cut(whole.momentum, IN, r0, r1, c0, c1));
        REQUIRE(r.dbias == cut(whole.dbias, OUT, 0, 1, r0, r1));
        const bool part = c.parallel == FORGE_PARALLEL_COLUMN && c.sequence_parallel;
        const size_t share = TOKENS / RANKS, t0 = part ? static_cast<size_t>(rank) * share : 0;
        const auto dx = cut(whole.dx, IN, t0, t0 + (part ? share : TOKENS), c0, c1);
        const double difference = largest_difference(r.dx, dx);
        // Row parallel sums the same terms in the same order; column parallel adds two partial
        // sums.
        REQUIRE(difference <= (c.parallel == FORGE_PARALLEL_ROW ? 0.0 : 1e-5));
        dx_difference = std::fmax(dx_difference, difference);
        REQUIRE((waits[rank] > 0) == deferred);
    }
    std::printf("%-22s %s: equal to the unsharded; dX within %.1e\n", c.name,
                deferred ? "wait    " : "blocking", dx_difference);
}

struct Log {
    std::atomic<int> warnings{0}, debug{0};
};

void log_line(void *user, uint32_t level, const char *target, const char *message) {
    auto *log = static_cast<Log *>(user);
    std::printf("log %u [%s] %s\n", static_cast<unsigned>(level), target, message);
    if (level == 2) {
        log->warnings++;
    } else if (level == 4) {
        log->debug++;
    }
}

// A warning of an update that met an infinite gradient, and every failure as a debugging line.
void check_log(forge_context *context, Problem problem) {
    Log log;
    OK(forge_set_log_callback(log_line, &log, 4));
    forge_comm *comm = nullptr;
    OK(forge_comm_new_solo(context, &comm));
    const Communicator comm_owner(comm);
    const Case c = {"unsharded", FORGE_PARALLEL_NONE, false, FORGE_WEIGHT_F32};
    const Linear linear = make_linear(context, comm, c);

    std::vector<float> weight = problem.weight, momentum(weight.size());
    problem.dy[0] = INFINITY;
    forge_parameter parameter{};
    parameter.struct_size = sizeof parameter;
    parameter.weight = writable(weight);
    parameter.states[0] = writable(momentum);
    forge_step step{};
    step.struct_size = sizeof step;
    step.scalars.step = 1;
    step.scalars.grad_scale = 1.0;
    step.scalars.hyper[FORGE_HYPER_LR] = 0.01;
    forge_segment segment{};
    segment.tokens = TOKENS;
    segment.dy = readable(problem.dy);
    segment.x = readable(problem.x);
    forge_update update{};
    update.struct_size = sizeof update;
    update.n_segments = 1;
    update.segments = &segment;
    update.parameter = &parameter;
    update.step = &step;
    forge_report report{};
    report.struct_size = sizeof report;
    OK(forge_linear_update(linear.get(), &update, &report, nullptr));
    REQUIRE(report.nonfinite_tiles > 0);
    REQUIRE(log.warnings == 1);
    // This W is one tile: all of it was left as it was.
    REQUIRE(report.tiles > 1 || weight == problem.weight);

    update.struct_size = 0;
    REQUIRE(forge_linear_update(linear.get(), &update, &report, nullptr) ==
            FORGE_ERROR_STRUCT_SIZE);
    REQUIRE(log.debug >= 1);

    OK(forge_set_log_callback(nullptr, nullptr, 0));
    const int lines = log.warnings + log.debug;
    REQUIRE(forge_linear_update(linear.get(), &update, &report, nullptr) ==
            FORGE_ERROR_STRUCT_SIZE);
    REQUIRE(log.warnings + log.debug == lines);
}

} // namespace

int main() {
    forge_context_config config{sizeof config, FORGE_BACKEND_CPU, 0, 2, nullptr};
    forge_context *context = nullptr;
    OK(forge_context_new(&config, &context));
    const Context context_owner(context);

    Problem problem;
    uint64_t seed = 8;
    problem.weight.resize(OUT * IN);
    problem.dy.resize(TOKENS * OUT);
    problem.x.resize(TOKENS * IN);
    fill_uniform(problem.weight.data(), problem.weight.size(), 1.0f, &seed);
    fill_uniform(problem.dy.data(), problem.dy.size(), 1.0f, &seed);
    fill_uniform(problem.x.data(), problem.x.size(), 1.0f, &seed);

    const Case cases[] = {
        {"column", FORGE_PARALLEL_COLUMN, false, FORGE_WEIGHT_F32},
        {"column + SP", FORGE_PARALLEL_COLUMN, true, FORGE_WEIGHT_F32},
        {"row", FORGE_PARALLEL_ROW, false, FORGE_WEIGHT_F32},
        {"row + SP", FORGE_PARALLEL_ROW, true, FORGE_WEIGHT_F32},
        {"column, bf16 weight", FORGE_PARALLEL_COLUMN, false, FORGE_WEIGHT_BF16},
        {"column + SP, bf16", FORGE_PARALLEL_COLUMN, true, FORGE_WEIGHT_BF16},
        {"row, bf16 weight", FORGE_PARALLEL_ROW, false, FORGE_WEIGHT_BF16},
        {"row + SP, bf16", FORGE_PARALLEL_ROW, true, FORGE_WEIGHT_BF16},
    };
    for (const bool deferred : {false, true}) {
        for (const Case &c : cases) {
            compare(context, c, deferred, problem);
        }
    }
    check_log(context, problem);
    return 0;
}
