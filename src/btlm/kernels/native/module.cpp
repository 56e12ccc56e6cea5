// The Python module: checks what it is given, releases the interpreter, and calls the operations.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>
#include <stdexcept>
#include <system_error>

#ifdef _WIN32
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

#include "dispatch.h"
#include "operations.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Any = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const uint16_t, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t MOST = int64_t{1} << 48;  // elements of an array

void require(bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument(what);
}

std::string shape(int64_t a, int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; }

void require_rows(int64_t rows, int64_t columns, int64_t want_rows, int64_t want_columns, const char* name) {
    require(rows == want_rows && columns == want_columns,
            std::string(name) + " is " + shape(rows, columns) + ", and must be " + shape(want_rows, want_columns));
}

btlm::CacheKind cache_kind(const std::string& name) {
    if (name == "int4") return btlm::CacheKind::int4;
    if (name == "int8") return btlm::CacheKind::int8;
    if (name == "bf16") return btlm::CacheKind::bf16;
    require(name == "f32", "the kind of cache " + name + " is not int4, int8, bf16 or f32");
    return btlm::CacheKind::f32;
}

template <class Array>
int64_t size_of(const Array& array) {
    return static_cast<int64_t>(array.size());
}

// A matrix, and what keeps its memory alive.
struct PyMatrix {
    btlm::Matrix matrix;
    Any weight;
    std::optional<Halves> scale;
    std::optional<Floats> bias;

    PyMatrix(const std::string& kind, Any weight_, std::optional<Halves> scale_, std::optional<Floats> bias_, int64_t rows,
             int64_t columns, int group, bool input_major)
        : weight(weight_), scale(scale_), bias(bias_) {
        const bool q4 = kind == "q4", packed = q4 || kind == "q8", bf16 = kind == "bf16";
        require(packed || bf16 || kind == "f32", "the kind of matrix " + kind + " is not q4, q8, bf16 or f32");
        require(rows > 0 && columns > 0, "a matrix of " + shape(rows, columns) + " is empty");
        require(rows <= MOST / columns, "a matrix of " + shape(rows, columns) + " exceeds all memory");
        const int64_t bytes = packed ? rows * columns / (q4 ? 2 : 1) : rows * columns * (bf16 ? 2 : 4);
        require(static_cast<int64_t>(weight.nbytes()) == bytes,
                "the weight holds " + std::to_string(weight.nbytes()) + " bytes, and " + shape(rows, columns) + " in " + kind +
                    " takes " + std::to_string(bytes));
        if (packed) {
            require(group > 0 && group % btlm::LANES == 0 && columns % group == 0,
                    "a group of " + std::to_string(group) + " does not divide " + std::to_string(columns) + " columns");
            require(rows % btlm::LANES == 0, std::to_string(rows) + " rows are no multiple of 16");
            require(scale.has_value() && size_of(*scale) == rows * (columns / group), "the scales do not fit the matrix");
            require(!input_major, "packed matrices have one layout");
        }
        require(!bias.has_value() || size_of(*bias) == rows, "the bias does not fit the matrix");
        matrix = {q4 ? btlm::Kind::q4 : packed ? btlm::Kind::q8 : bf16 ? btlm::Kind::bf16 : btlm::Kind::f32,
                  weight.data(), packed ? scale->data() : nullptr, bias ? bias->data() : nullptr, rows, columns,
                  group, input_major};
    }
};

struct PyCache {
    btlm::Cache cache;
    nb::ndarray<nb::c_contig, nb::device::cpu> keys, values;
    std::optional<nb::ndarray<uint16_t, nb::c_contig, nb::device::cpu>> key_scales, value_scales;

    PyCache(const std::string& kind, nb::ndarray<nb::c_contig, nb::device::cpu> keys_,
            nb::ndarray<nb::c_contig, nb::device::cpu> values_,
            std::optional<nb::ndarray<uint16_t, nb::c_contig, nb::device::cpu>> key_scales_,
            std::optional<nb::ndarray<uint16_t, nb::c_contig, nb::device::cpu>> value_scales_, int64_t slots, int64_t heads,
            int64_t capacity, int64_t head_dim)
        : keys(keys_), values(values_), key_scales(key_scales_), value_scales(value_scales_) {
        const btlm::CacheKind of = cache_kind(kind);
        const bool packed = btlm::packed(of);
        require(slots > 0 && heads > 0 && capacity > 0 && capacity % btlm::KEY_BLOCK == 0,
                "a cache needs slots, heads, and a capacity that is a multiple of 64");
        require(head_dim > 0 && head_dim <= btlm::MAX_HEAD_DIM, "heads of " + std::to_string(head_dim) + " exceed 256");
        const int64_t width = (head_dim + btlm::LANES - 1) / btlm::LANES * btlm::LANES;
        require(slots <= MOST / heads / capacity / width, "the cache exceeds all memory");
        const int64_t bytes = slots * heads * capacity * width * btlm::bits(of) / 8;
        require(static_cast<int64_t>(keys.nbytes()) == bytes && static_cast<int64_t>(values.nbytes()) == bytes,
                "keys and values must take " + std::to_string(bytes) + " bytes each");
        const int64_t scales = slots * heads * capacity;
        require(!packed || (key_scales && value_scales && size_of(*key_scales) == scales && size_of(*value_scales) == scales),
                "a cache of " + kind + " needs " + std::to_string(scales) + " scales each of keys and values");
        cache = {of, keys.data(), values.data(), packed ? key_scales->data() : nullptr,
                 packed ? value_scales->data() : nullptr, slots, heads, capacity, head_dim, width};
    }
};

// One set of operations for the process: threads and scratch memory are shared, one call runs at a time.
struct Shared {
    std::mutex busy;
    std::unique_ptr<btlm::Operations> operations = std::make_unique<btlm::Operations>(1);
    int process = getpid();
};

Shared& shared() {
    static auto* instance = new Shared;  // never destroyed: threads must not be joined while the process exits
    return *instance;
}

void restart(int threads) {
    std::unique_ptr<btlm::Operations> next;
    try {
        next = std::make_unique<btlm::Operations>(threads);
    } catch (const std::system_error&) {
        throw std::invalid_argument(std::to_string(threads) + " threads are more than the system gives; use fewer");
    }
    next->path = shared().operations->path;
    shared().operations.swap(next);
    if (shared().process != getpid()) next.release();  // nobody joins threads that a fork left behind
    shared().process = getpid();
}

template <class Body>
void run(const Body& body) {
    nb::gil_scoped_release free;
    std::lock_guard<std::mutex> alone(shared().busy);
    if (shared().process != getpid()) restart(shared().operations->threads());
    body(*shared().operations);
}

void linear(const Rows& x, const PyMatrix& matrix, const OutRows& out, const PyMatrix* gate, bool add) {
    const btlm::Matrix& m = matrix.matrix;
    const auto tokens = static_cast<int64_t>(x.shape(0));
    require_rows(tokens, static_cast<int64_t>(x.shape(1)), tokens, m.columns, "x");
    require_rows(static_cast<int64_t>(out.shape(0)), static_cast<int64_t>(out.shape(1)), tokens, m.rows, "out");
    if (gate != nullptr) {
        const btlm::Matrix& g = gate->matrix;
        require(g.kind == m.kind && g.rows == m.rows && g.columns == m.columns && g.group == m.group &&
                    g.input_major == m.input_major,
                "the gate must have the kind and shape of the matrix");
    }
    if (tokens == 0) return;
    run([&](btlm::Operations& operations) {
        operations.linear(m, gate != nullptr ? &gate->matrix : nullptr, x.data(), m.columns, tokens,
                          {out.data(), m.rows, add});
    });
}

void layer_norm(const Rows& x, const Floats& weight, const Floats& bias, float eps, const OutRows& out) {
    const auto tokens = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
    require_rows(size_of(weight), size_of(bias), columns, columns, "sizes of weight and bias");
    require_rows(static_cast<int64_t>(out.shape(0)), static_cast<int64_t>(out.shape(1)), tokens, columns, "out");
    run([&](btlm::Operations& operations) {
        operations.layer_norm(x.data(), weight.data(), bias.data(), eps, tokens, columns, out.data());
    });
}

void embed(const Ids& ids, const PyMatrix& matrix, float factor, const OutRows& out) {
    const btlm::Matrix& m = matrix.matrix;
    require(!m.input_major, "a table has a row a token");
    require_rows(static_cast<int64_t>(out.shape(0)), static_cast<int64_t>(out.shape(1)), size_of(ids), m.columns, "out");
    for (size_t i = 0; i < ids.size(); ++i)
        require(ids.data()[i] >= 0 && ids.data()[i] < m.rows,
                "token " + std::to_string(ids.data()[i]) + " is not in a table of " + std::to_string(m.rows));
    run([&](btlm::Operations& operations) { operations.embed(m, ids.data(), size_of(ids), factor, out.data()); });
}

void attend(const Rows& qkv, const PyCache& cache,
            const nb::ndarray<const int64_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>& segments, const Floats& slopes,
            float scale, const OutRows& out) {
    const btlm::Cache& c = cache.cache;
    const auto tokens = static_cast<int64_t>(qkv.shape(0));
    const int64_t width = c.heads * c.head_dim;
    require_rows(tokens, static_cast<int64_t>(qkv.shape(1)), tokens, 3 * width, "qkv");
    require_rows(static_cast<int64_t>(out.shape(0)), static_cast<int64_t>(out.shape(1)), tokens, width, "out");
    require(size_of(slopes) == c.heads, "there must be a slope a head");
    static_assert(sizeof(btlm::Segment) == 4 * sizeof(int64_t));
    const auto* first = reinterpret_cast<const btlm::Segment*>(segments.data());
    const auto count = static_cast<int64_t>(segments.shape(0));
    for (int64_t i = 0; i < count; ++i) {
        const btlm::Segment& s = first[i];
        require(s.count > 0 && s.row >= 0 && s.count <= tokens - s.row, "a segment exceeds the batch");
        require(s.slot >= 0 && s.slot < c.slots && s.start >= 0 && s.count <= c.capacity - s.start,
                "a segment of " + std::to_string(s.count) + " tokens from " + std::to_string(s.start) + " in slot " +
                    std::to_string(s.slot) + " exceeds a cache of " + std::to_string(c.slots) + " slots of " +
                    std::to_string(c.capacity) + " tokens");
    }
    run([&](btlm::Operations& operations) {
        operations.attend(c, qkv.data(), first, count, slopes.data(), scale, out.data());
    });
}

int64_t sum_bytes(const Bytes& bytes) {
    int64_t sum = 0;
    run([&](btlm::Operations& operations) { sum = operations.sum_bytes(bytes.data(), size_of(bytes)); });
    return sum;
}

void set_threads(int threads) {
    require(threads >= 1 && threads <= 1024, std::to_string(threads) + " threads are not between 1 and 1,024");
    run([&](const btlm::Operations& operations) {
        if (operations.threads() != threads) restart(threads);
    });
}

int threads() {
    int count = 0;
    run([&](const btlm::Operations& operations) { count = operations.threads(); });
    return count;
}

std::string path() {
    std::string name;
    run([&](const btlm::Operations& operations) { name = operations.path->name; });
    return name;
}

std::vector<std::string> paths() {
    std::vector<std::string> names;
    for (const btlm::Path* path : btlm::available_paths()) names.emplace_back(path->name);
    return names;
}

void use_path(const std::string& name) {
    for (const btlm::Path* path : btlm::available_paths()) {
        if (name == path->name) return run([&](btlm::Operations& operations) { operations.path = path; });
    }
    throw std::invalid_argument("this machine has no instruction path " + name);
}

}  // namespace

NB_MODULE(_native, m) {
    // What is written to is taken as it is: a converted copy would receive the result, and be lost.
    nb::class_<PyMatrix>(m, "Matrix")
        .def(nb::init<const std::string&, Any, std::optional<Halves>, std::optional<Floats>, int64_t, int64_t, int, bool>(),
             "kind"_a, "weight"_a, "scale"_a.none(), "bias"_a.none(), "rows"_a, "columns"_a, "group"_a = 0,
             "input_major"_a = false)
        .def_prop_ro("rows", [](const PyMatrix& matrix) { return matrix.matrix.rows; })
        .def_prop_ro("columns", [](const PyMatrix& matrix) { return matrix.matrix.columns; });
    nb::class_<PyCache>(m, "Cache")
        .def(nb::init<const std::string&, nb::ndarray<nb::c_contig, nb::device::cpu>,
                      nb::ndarray<nb::c_contig, nb::device::cpu>,
                      std::optional<nb::ndarray<uint16_t, nb::c_contig, nb::device::cpu>>,
                      std::optional<nb::ndarray<uint16_t, nb::c_contig, nb::device::cpu>>, int64_t, int64_t, int64_t,
                      int64_t>(),
             "kind"_a, "keys"_a.noconvert(), "values"_a.noconvert(), "key_scales"_a.noconvert().none(),
             "value_scales"_a.noconvert().none(), "slots"_a, "heads"_a,
             "capacity"_a, "head_dim"_a);
    m.def("linear", &linear, "x"_a, "matrix"_a, "out"_a.noconvert(), "gate"_a.none() = nb::none(), "add"_a = false);
    m.def("layer_norm", &layer_norm, "x"_a, "weight"_a, "bias"_a, "eps"_a, "out"_a.noconvert());
    m.def("embed", &embed, "ids"_a, "matrix"_a, "factor"_a, "out"_a.noconvert());
    m.def("attend", &attend, "qkv"_a, "cache"_a, "segments"_a, "slopes"_a, "scale"_a, "out"_a.noconvert());
    m.def("sum_bytes", &sum_bytes, "values"_a);
    m.def("set_threads", &set_threads, "threads"_a);
    m.def("threads", &threads);
    m.def("paths", &paths);
    m.def("path", &path);
    m.def("use_path", &use_path, "name"_a);
}
