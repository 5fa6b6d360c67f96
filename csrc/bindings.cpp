// The Python module repo_fast._C. Arguments are buffers (such as Tensor.numpy()), so neither building nor loading it
// needs PyTorch; bfloat16 numbers pass as uint16, their bits. Buffers and indices are checked here, since memory is
// read without further questions; the GIL is released while an op runs.
//
// The linear ops see one chunk of logits after the other: what the chunks of a call share is an object, which keeps its
// buffers alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "add_product.h"
#include "fused_rectified_policy_loss.h"
#include "generalized_advantages.h"
#include "instruction_set.h"
#include "linear_log_probs.h"
#include "linear_rows.h"
#include "prompt_violations.h"
#include "rectified_policy_loss.h"

namespace py = pybind11;
using namespace repo_fast;

namespace {

using OptionalBuffer = std::optional<py::buffer>;

template <typename T>
py::buffer_info request(const py::buffer& buffer, const char* name, py::ssize_t dimensions, bool writable) {
    py::buffer_info info = buffer.request(writable);
    if (!info.item_type_is_equivalent_to<T>()) {
        throw py::type_error(std::string(name) + " must hold " + py::type_id<T>() + ", got buffer format " +
                             info.format);
    }
    if (info.ndim != dimensions) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(dimensions) + " dimensions, got " +
                              std::to_string(info.ndim));
    }
    return info;
}

// The number of elements from one row to the next; each row's own must be adjacent.
template <typename T>
py::ssize_t row_stride(const py::buffer_info& info, const char* name) {
    constexpr auto size = static_cast<py::ssize_t>(sizeof(T));
    const bool one_row = info.shape[0] <= 1;
    if ((info.shape[1] > 1 && info.strides[1] != size) || (!one_row && info.strides[0] % size != 0)) {
        throw py::value_error(std::string(name) + " must have unit stride along its rows");
    }
    return one_row ? info.shape[1] : info.strides[0] / size;
}

void check_size(const char* name, py::ssize_t size, py::ssize_t expected) {
    if (size != expected) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(expected) + " elements, got " +
                              std::to_string(size));
    }
}

// The buffers behind the pointers of an object.
class Buffers {
public:
    // The elements of a contiguous vector of `size` (< 0: any), whose size is then that.
    template <typename T>
    T* vector(const py::buffer& buffer, const char* name, py::ssize_t& size, bool writable = false) {
        py::buffer_info info = request<T>(buffer, name, 1, writable);
        if (info.size > 1 && info.strides[0] != static_cast<py::ssize_t>(sizeof(T))) {
            throw py::value_error(std::string(name) + " must be a contiguous vector");
        }
        if (size < 0) {
            size = info.size;
        }
        check_size(name, info.size, size);
        return static_cast<T*>(keep(std::move(info)).ptr);
    }

    template <typename T>
    T* vector(const OptionalBuffer& buffer, const char* name, py::ssize_t& size, bool writable = false) {
        return buffer ? vector<T>(*buffer, name, size, writable) : nullptr;
    }

    const py::buffer_info& keep(py::buffer_info&& info) { return infos_.emplace_back(std::move(info)); }

private:
    std::vector<py::buffer_info> infos_;
};

// The tokens of the valid rows, [N]; N = T and null if all are.
const std::int64_t* valid_tokens(Buffers& buffers, const OptionalBuffer& rows, py::ssize_t T, py::ssize_t& N) {
    if (!rows) {
        N = T;
        return nullptr;
    }
    N = -1;
    const auto* tokens = buffers.vector<std::int64_t>(*rows, "rows", N);
    for (py::ssize_t i = 0; i < N; ++i) {
        if (tokens[i] < 0 || tokens[i] >= T) {
            throw py::value_error("rows must be in [0, T=" + std::to_string(T) + "), got " + std::to_string(tokens[i]));
        }
    }
    return tokens;
}

struct BoundRows {
    Buffers buffers;
    LinearRows linear;
    py::ssize_t T;

    BoundRows(const py::buffer& targets, const OptionalBuffer& rows, const OptionalBuffer& weight, std::int64_t V,
              double temperature, std::optional<double> softcap, int threads) {
        T = -1;
        linear = {};
        linear.targets = buffers.vector<std::int64_t>(targets, "targets", T);
        linear.tokens = valid_tokens(buffers, rows, T, linear.N);
        linear.V = V;
        linear.scale = {static_cast<float>(1.0 / temperature), static_cast<float>(softcap.value_or(0.0))};
        linear.threads = threads;
        for (std::int64_t i = 0; i < linear.N; ++i) {
            const std::int64_t target = linear.targets[linear.tokens ? linear.tokens[i] : i];
            if (target < 0 || target >= V) {
                throw py::value_error("targets must be in [0, V=" + std::to_string(V) + "), got " +
                                      std::to_string(target));
            }
        }
        if (weight) {
            const auto& info = buffers.keep(request<Bfloat16>(*weight, "weight", 2, false));
            check_size("a column of weight", info.shape[0], V);
            linear.weight = static_cast<const Bfloat16*>(info.ptr);
            linear.weight_stride = row_stride<Bfloat16>(info, "weight");
            linear.D = info.shape[1];
        }
    }
};

// The first element and the stride of logits [R, V] of valid rows start to start + R; R is returned in `rows`.
template <typename Element>
std::pair<Element*, std::int64_t> chunk_memory(const LinearRows& linear, const py::buffer_info& info, const char* name,
                                               std::int64_t start, std::int64_t& rows) {
    check_size((std::string("a row of ") + name).c_str(), info.shape[1], linear.V);
    const std::int64_t stride = row_stride<Element>(info, name);
    rows = info.shape[0];
    if (stride < linear.V) {
        throw py::value_error(std::string(name) + " must have rows that do not overlap");
    }
    if (start < 0 || start + rows > linear.N) {
        throw py::value_error(std::string(name) + " must be of valid rows in [0, N=" + std::to_string(linear.N) +
                              "), got " + std::to_string(rows) + " from " + std::to_string(start));
    }
    return {static_cast<Element*>(info.ptr), stride};
}

// Calls function(chunk) on the logits [R, V] of valid rows start to start + R, without the GIL.
template <typename Function>
void with_chunk(const LinearRows& linear, const py::buffer& logits, const OptionalBuffer& hidden, std::int64_t start,
                const OptionalBuffer& kept, Function&& function) {
    const auto run = [&](auto element, const py::buffer_info* hidden_info) {
        using Element = decltype(element);
        const py::buffer_info info = request<Element>(logits, "logits", 2, true);
        Chunk<Element> chunk{};
        std::tie(chunk.logits, chunk.stride) = chunk_memory<Element>(linear, info, "logits", start, chunk.rows);
        chunk.start = start;
        std::optional<py::buffer_info> kept_info;  // must live as long as the pointer
        if (kept) {
            kept_info = request<Element>(*kept, "kept", 2, false);
            std::int64_t rows;
            std::tie(chunk.kept, chunk.kept_stride) = chunk_memory<const Element>(linear, *kept_info, "kept", start, rows);
            check_size("a column of kept", rows, chunk.rows);
        }
        if (hidden_info) {
            check_size("a column of hidden", hidden_info->shape[0], chunk.rows);
            check_size("a row of hidden", hidden_info->shape[1], linear.D);
            chunk.hidden = static_cast<const Bfloat16*>(hidden_info->ptr);
            chunk.hidden_stride = row_stride<Bfloat16>(*hidden_info, "hidden");
        }
        const py::gil_scoped_release release;
        function(chunk);
    };
    if (!linear.weight) {
        run(float{}, nullptr);
    } else if (hidden) {
        const py::buffer_info info = request<Bfloat16>(*hidden, "hidden", 2, false);
        run(Bfloat16{}, &info);
    } else {
        throw py::type_error("hidden must be given with bfloat16 logits, got None");
    }
}

Reduction reduction_of(const std::string& name) {
    if (name == "sequence_mean") return Reduction::sequence_mean;
    if (name == "token_mean") return Reduction::token_mean;
    if (name == "sum") return Reduction::sum;
    throw py::value_error("reduction must be sequence_mean, token_mean or sum, got " + name);
}

Scope scope_of(const std::string& name) {
    if (name == "prompt") return Scope::prompt;
    if (name == "response") return Scope::response;
    if (name == "batch") return Scope::batch;
    throw py::value_error("scope must be prompt, response or batch, got " + name);
}

struct BoundTokens {
    Buffers buffers;
    PolicyTokens tokens;
    py::ssize_t T;
    double unsafe_share;

    BoundTokens(const std::string& op, const OptionalBuffer& rows, const OptionalBuffer& old_log_probs,
                const py::buffer& reward_advantages, const py::buffer& cost_advantages, const py::buffer& sequence_ids,
                const py::buffer& violations, float multiplier, bool rectify, bool mixed, double clip_low,
                double clip_high, const OptionalBuffer& ref_log_probs, double kl_coefficient,
                const std::string& reduction, std::optional<double> denominator,
                const OptionalBuffer& importance_weights) {
        T = -1;
        tokens.sequence_ids = buffers.vector<std::int64_t>(sequence_ids, "sequence_ids", T);
        tokens.tokens = valid_tokens(buffers, rows, T, tokens.N);
        tokens.old_log_probs = buffers.vector<float>(old_log_probs, "old_log_probs", T);
        tokens.reward_advantages = buffers.vector<float>(reward_advantages, "reward_advantages", T);
        tokens.cost_advantages = buffers.vector<float>(cost_advantages, "cost_advantages", T);
        tokens.ref_log_probs = buffers.vector<float>(ref_log_probs, "ref_log_probs", T);
        tokens.importance_weights = buffers.vector<float>(importance_weights, "importance_weights", T);
        tokens.objective = {multiplier, rectify, mixed, clip_low, clip_high, kl_coefficient, reduction_of(reduction),
                            denominator};
        py::ssize_t S = -1;
        const auto* own_violations = buffers.vector<float>(violations, "violations", S);
        tokens.sequences = weigh_sequences(op, tokens, own_violations, S);
        unsafe_share = unsafe_fraction(own_violations, S);
    }
};

// (loss, clip_fraction, approx_kl, unsafe_fraction)
py::tuple results_of(const LossTotals& totals, const BoundTokens& tokens) {
    const auto count = static_cast<double>(std::max<std::int64_t>(tokens.tokens.N, 1));
    return py::make_tuple(totals.loss, static_cast<double>(totals.clipped) / count, totals.divergence / count,
                          tokens.unsafe_share);
}

class BoundFusedLoss {
public:
    BoundFusedLoss(const BoundRows& rows, const BoundTokens& tokens, float entropy_coefficient, bool need_gradient,
                   const py::buffer& log_probs, const OptionalBuffer& entropy)
        : tokens_(tokens), loss_(make(rows, entropy_coefficient, need_gradient, log_probs, entropy)) {}

    void row_pass(const py::buffer& logits, const OptionalBuffer& hidden, std::int64_t start) {
        with_chunk(loss_.linear(), logits, hidden, start, {}, [this](const auto& chunk) { loss_.row_pass(chunk); });
    }

    py::tuple results() const { return results_of(loss_.totals(), tokens_); }

private:
    FusedPolicyLoss make(const BoundRows& rows, float entropy_coefficient, bool need_gradient,
                         const py::buffer& log_probs, const OptionalBuffer& entropy) {
        py::ssize_t T = rows.T;
        if (entropy_coefficient > 0 && !entropy) {
            throw py::value_error("entropy must be given with an entropy_coefficient > 0, got None");
        }
        check_size("sequence_ids", tokens_.T, T);
        // The sequence ids have been checked at the tokens' own rows only.
        const PolicyTokens& tokens = tokens_.tokens;
        if (tokens.N != rows.linear.N || (tokens.N > 0 && tokens.tokens != rows.linear.tokens)) {
            throw py::value_error("rows and tokens must be made of the same rows");
        }
        auto* log_probs_out = buffers_.vector<float>(log_probs, "log_probs", T, true);
        auto* entropy_out = buffers_.vector<float>(entropy, "entropy", T, true);
        return {rows.linear, tokens, entropy_coefficient, need_gradient, log_probs_out, entropy_out};
    }

    const BoundTokens& tokens_;  // kept alive by Python, as are the rows
    Buffers buffers_;
    FusedPolicyLoss loss_;
};

void bind_linear_log_probs(py::module_& module) {
    const auto log_probs = [](const BoundRows& rows, const py::buffer& log_probs, const OptionalBuffer& entropy,
                              const py::buffer& logits, const OptionalBuffer& hidden, std::int64_t start) {
        Buffers outputs;
        py::ssize_t T = rows.T;
        auto* log_probs_out = outputs.vector<float>(log_probs, "log_probs", T, true);
        auto* entropy_out = outputs.vector<float>(entropy, "entropy", T, true);
        with_chunk(rows.linear, logits, hidden, start, {},
                   [&](const auto& chunk) { linear_log_probs(rows.linear, chunk, log_probs_out, entropy_out); });
    };
    const auto backward = [](const BoundRows& rows, const py::buffer& grad_log_probs,
                             const OptionalBuffer& grad_entropy, const py::buffer& logits, const OptionalBuffer& hidden,
                             std::int64_t start, const OptionalBuffer& kept) {
        Buffers inputs;
        py::ssize_t T = rows.T;
        const auto* log_probs_in = inputs.vector<float>(grad_log_probs, "grad_log_probs", T);
        const auto* entropy_in = inputs.vector<float>(grad_entropy, "grad_entropy", T);
        with_chunk(rows.linear, logits, hidden, start, kept,
                   [&](const auto& chunk) { linear_log_probs_backward(rows.linear, chunk, log_probs_in, entropy_in); });
    };
    py::class_<BoundRows>(
        module, "LinearRows",
        "What the chunks of a linear op share: targets int64 [T]; rows int64 [N], the tokens that have one, "
        "None for all; weight bfloat16 [V, D] if the logits are bfloat16, None if they are float32.\n"
        "A chunk is logits [R, V] of valid rows start to start + R, and hidden bfloat16 [R, D] if they are.")
        .def(py::init<const py::buffer&, const OptionalBuffer&, const OptionalBuffer&, std::int64_t, double,
                      std::optional<double>, int>(),
             py::arg("targets"), py::arg("rows"), py::arg("weight"), py::arg("V"), py::arg("temperature"),
             py::arg("softcap"), py::arg("threads"))
        .def("log_probs", log_probs, py::arg("log_probs"), py::arg("entropy"), py::arg("logits"), py::arg("hidden"),
             py::arg("start"),
             "Writes log_probs and, unless None, entropy, float32 [T], at the tokens of a chunk, whose logits it leaves.")
        .def("backward", backward, py::arg("grad_log_probs"), py::arg("grad_entropy"), py::arg("logits"),
             py::arg("hidden"), py::arg("start"), py::arg("kept") = py::none(),
             "Overwrites a chunk's logits by their gradient, given the incoming ones, float32 [T]. Or writes the gradient "
             "of those in kept [R, V], which is only read, to logits.");
}

void bind_policy_losses(py::module_& module) {
    py::class_<BoundTokens>(
        module, "PolicyTokens",
        "What the policy losses know about the tokens besides their log-probabilities; arguments as those "
        "of rectified_policy_loss, and rows int64 [N], the valid tokens, None for all.")
        .def(
            py::init<const std::string&, const OptionalBuffer&, const OptionalBuffer&, const py::buffer&,
                     const py::buffer&, const py::buffer&, const py::buffer&, float, bool, bool, double, double,
                     const OptionalBuffer&, double, const std::string&, std::optional<double>, const OptionalBuffer&>(),
            py::arg("op"), py::arg("rows"), py::arg("old_log_probs"), py::arg("reward_advantages"),
            py::arg("cost_advantages"), py::arg("sequence_ids"), py::arg("violations"), py::arg("multiplier"),
            py::arg("rectify"), py::arg("mixed"), py::arg("clip_low"), py::arg("clip_high"), py::arg("ref_log_probs"),
            py::arg("kl_coefficient"), py::arg("reduction"), py::arg("denominator"), py::arg("importance_weights"));
    module.def(
        "rectified_policy_loss",
        [](const BoundTokens& tokens, const py::buffer& log_probs, const py::buffer& gradient) {
            Buffers buffers;
            py::ssize_t T = tokens.T;
            const auto* log_probs_in = buffers.vector<float>(log_probs, "log_probs", T);
            auto* gradient_out = buffers.vector<float>(gradient, "gradient", T, true);
            LossTotals totals;
            {
                const py::gil_scoped_release release;
                totals = rectified_policy_loss(tokens.tokens, log_probs_in, gradient_out);
            }
            return results_of(totals, tokens);
        },
        py::arg("tokens"), py::arg("log_probs"), py::arg("gradient"),
        "Writes d loss / d log_probs, float32 [T], at the valid tokens. Returns (loss, clip_fraction, approx_kl, "
        "unsafe_fraction).");
    py::class_<BoundFusedLoss>(
        module, "FusedPolicyLoss",
        "The fused op: row_pass takes the chunks, writes log_probs and, unless None, entropy, float32 [T], at their "
        "tokens, and overwrites their logits by the gradient of the loss, if needed.")
        .def(py::init<const BoundRows&, const BoundTokens&, float, bool, const py::buffer&, const OptionalBuffer&>(),
             py::arg("rows"), py::arg("tokens"), py::arg("entropy_coefficient"), py::arg("need_gradient"),
             py::arg("log_probs"), py::arg("entropy"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def("row_pass", &BoundFusedLoss::row_pass, py::arg("logits"), py::arg("hidden"), py::arg("start"))
        .def("results", &BoundFusedLoss::results,
             "(loss, clip_fraction, approx_kl, unsafe_fraction), after all chunks.");
}

void add_product_of(const py::buffer& high, const py::buffer& low, const py::buffer& product, int threads) {
    Buffers buffers;
    py::ssize_t size = -1;
    auto* high_out = buffers.vector<Bfloat16>(high, "high", size, true);
    auto* low_out = buffers.vector<Bfloat16>(low, "low", size, true);
    const auto* addend = buffers.vector<Bfloat16>(product, "product", size);
    const py::gil_scoped_release release;
    add_product(high_out, low_out, addend, size, threads);
}

void prompt_violations_of(const py::buffer& costs, const py::buffer& prompt_ids, const std::string& scope,
                          float threshold, const py::buffer& violations) {
    Buffers buffers;
    py::ssize_t S = -1;
    const auto* costs_in = buffers.vector<float>(costs, "costs", S);
    const auto* ids = buffers.vector<std::int64_t>(prompt_ids, "prompt_ids", S);
    auto* out = buffers.vector<float>(violations, "violations", S, true);
    const Scope chosen = scope_of(scope);
    const py::gil_scoped_release release;
    prompt_violations(costs_in, ids, S, chosen, threshold, out);
}

void generalized_advantages_of(const py::buffer& rewards, const py::buffer& values, const py::buffer& cu_seqlens,
                               double gamma, double lambda, const py::buffer& advantages, const py::buffer& returns) {
    Buffers buffers;
    py::ssize_t size = -1;
    py::ssize_t bounds = -1;
    const auto* rewards_in = buffers.vector<float>(rewards, "rewards", size);
    const auto* values_in = buffers.vector<float>(values, "values", size);
    const auto* offsets = buffers.vector<std::int32_t>(cu_seqlens, "cu_seqlens", bounds);
    auto* advantages_out = buffers.vector<float>(advantages, "advantages", size, true);
    auto* returns_out = buffers.vector<float>(returns, "returns", size, true);

    bool rises = bounds >= 1 && offsets[0] == 0;
    for (py::ssize_t i = 1; rises && i < bounds; ++i) {
        rises = offsets[i] >= offsets[i - 1];
    }
    const py::ssize_t T = rises ? offsets[bounds - 1] : 0;
    if (!rises || (T == 0 ? size != 0 : size % T != 0)) {
        throw py::value_error("cu_seqlens must rise from 0 without a step down, to a divisor of " +
                              std::to_string(size));
    }
    const py::gil_scoped_release release;
    for (py::ssize_t stream = 0; stream < size; stream += T) {
        generalized_advantages(rewards_in + stream, values_in + stream, offsets, bounds - 1, gamma, lambda,
                               advantages_out + stream, returns_out + stream);
    }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ implementations of repo_fast.ops for CPU tensors.";
    bind_linear_log_probs(module);
    bind_policy_losses(module);
    module.def("add_product", &add_product_of, py::arg("high"), py::arg("low"), py::arg("product"), py::arg("threads"),
               "high + low += product, bfloat16 vectors of the same size.");
    module.def("prompt_violations", &prompt_violations_of, py::arg("costs"), py::arg("prompt_ids"), py::arg("scope"),
               py::arg("threshold"), py::arg("violations"),
               "Writes violations float32 [S] of costs float32 [S] and prompt_ids int64 [S].");
    module.def(
        "generalized_advantages", &generalized_advantages_of, py::arg("rewards"), py::arg("values"),
        py::arg("cu_seqlens"), py::arg("gamma"), py::arg("lam"), py::arg("advantages"), py::arg("returns"),
        "Writes advantages and returns of packed responses, given rewards and values: float32 [C * T], C streams one "
        "after the other over the same cu_seqlens int32 [S+1].");
    module.def("instruction_sets", &instruction_sets,
               "Names of those that the linear ops can use here, the best one last.");
    module.def(
        "instruction_set", [] { return row_kernels().name; }, "The one in use: the best, unless another was set.");
    module.def(
        "set_instruction_set", &set_instruction_set, py::arg("name"),
        "Makes the linear ops use another one, which gives other bits. ValueError if it is not one of those here.");
}
