// The Python module repo_fast._C: one function an op. Arguments are contiguous buffers (such as Tensor.numpy()), so neither building
// nor loading it needs PyTorch. Buffers are checked here, since what lies behind them is read without further questions;
// the GIL is released while an op runs.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "generalized_advantages.h"

namespace py = pybind11;

namespace {

// The elements of a contiguous one-dimensional buffer of T; size < 0 accepts any size.
template <typename T>
py::buffer_info vector_of(const py::buffer& buffer, const char* name, py::ssize_t size, bool writable = false) {
    py::buffer_info info = buffer.request(writable);
    if (!info.item_type_is_equivalent_to<T>()) {
        throw py::type_error(std::string(name) + " must hold " + py::type_id<T>() + ", got buffer format " + info.format);
    }
    if (info.ndim != 1 || (info.size > 1 && info.strides[0] != static_cast<py::ssize_t>(sizeof(T)))) {
        throw py::value_error(std::string(name) + " must be a contiguous vector");
    }
    if (size >= 0 && info.size != size) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(size) + " elements, got " +
                              std::to_string(info.size));
    }
    return info;
}

void generalized_advantages(const py::buffer& rewards, const py::buffer& values, const py::buffer& cu_seqlens, double gamma,
                            double lambda, const py::buffer& advantages, const py::buffer& returns) {
    const auto rewards_info = vector_of<float>(rewards, "rewards", -1);
    const py::ssize_t tokens = rewards_info.size;
    const auto values_info = vector_of<float>(values, "values", tokens);
    const auto lengths_info = vector_of<std::int32_t>(cu_seqlens, "cu_seqlens", -1);
    const auto advantages_info = vector_of<float>(advantages, "advantages", tokens, true);
    const auto returns_info = vector_of<float>(returns, "returns", tokens, true);

    const auto* offsets = static_cast<const std::int32_t*>(lengths_info.ptr);
    bool rises = lengths_info.size >= 1 && offsets[0] == 0 && offsets[lengths_info.size - 1] == tokens;
    for (py::ssize_t i = 1; rises && i < lengths_info.size; ++i) {
        rises = offsets[i] >= offsets[i - 1];
    }
    if (!rises) {
        throw py::value_error("cu_seqlens must rise from 0 to " + std::to_string(tokens) + " without a step down");
    }

    const py::gil_scoped_release release;
    repo_fast::generalized_advantages(static_cast<const float*>(rewards_info.ptr),
                                      static_cast<const float*>(values_info.ptr), offsets,
                                      static_cast<std::size_t>(lengths_info.size - 1), gamma, lambda,
                                      static_cast<float*>(advantages_info.ptr), static_cast<float*>(returns_info.ptr));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ implementations of repo_fast.ops for CPU tensors.";
    module.def("generalized_advantages", &generalized_advantages, py::arg("rewards"), py::arg("values"),
               py::arg("cu_seqlens"), py::arg("gamma"), py::arg("lam"), py::arg("advantages"), py::arg("returns"),
               "Writes advantages and returns, float32 [T], of packed responses: rewards, values float32 [T], cu_seqlens "
               "int32 [S+1].");
}
