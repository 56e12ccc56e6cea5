// The Python module: keeps arrays alive, releases the interpreter, and calls the operations.
//
// btlm.kernels.Kernels checks what callers pass and says what is wrong with it. What is checked here again keeps a call that
// did not go through it from reading or writing outside an array.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
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

template <class... Parts>
using Array = nb::ndarray<nb::c_contig, nb::device::cpu, Parts...>;
using Any = Array<nb::ro>;
using Floats = Array<const float, nb::ndim<1>>;
using Rows = Array<const float, nb::ndim<2>>;
using OutRows = Array<float, nb::ndim<2>>;
using Halves = Array<const uint16_t>;
using OutHalves = Array<uint16_t>;
using Ids = Array<const int64_t, nb::ndim<1>>;
using Segments = Array<const int64_t, nb::shape<-1, 4>>;
using Bytes = Array<const uint8_t, nb::ndim<1>>;
using Table = Array<const int32_t, nb::ndim<2>>;

constexpr int64_t MOST = int64_t{1} << 48;  // elements of an array

void guard(bool holds) {
    if (!holds) throw std::invalid_argument("the arrays do not fit together; call the kernels through btlm.kernels.Kernels");
}

template <class A>
int64_t size_of(const A& array) {
    return static_cast<int64_t>(array.size());
}

template <class A>
bool is(const A& array, int64_t rows, int64_t columns) {
    return static_cast<int64_t>(array.shape(0)) == rows && static_cast<int64_t>(array.shape(1)) == columns;
}

btlm::Dtype dtype_of(const std::string& name) {
    if (name == "int4") return btlm::Dtype::int4;
    if (name == "int8") return btlm::Dtype::int8;
    if (name == "bfloat16") return btlm::Dtype::bfloat16;
    guard(name == "float32");
    return btlm::Dtype::float32;
}

// A matrix, and the arrays that hold its memory.
struct PyMatrix {
    btlm::Matrix matrix;
    Any weight;
    std::optional<Halves> scale;
    std::optional<Floats> bias;

    PyMatrix(const std::string& dtype, Any weight_, std::optional<Halves> scale_, std::optional<Floats> bias_,
             int64_t rows, int64_t columns, int group, bool input_major)
        : weight(weight_), scale(scale_), bias(bias_) {
        const btlm::Dtype of = dtype_of(dtype);
        const bool packed = btlm::packed(of);
        guard(rows > 0 && columns > 0 && rows <= MOST / columns);
        guard(static_cast<int64_t>(weight.nbytes()) == rows * columns * btlm::bits(of) / 8);
        if (packed) {
            guard(group > 0 && group % btlm::LANES == 0 && columns % group == 0 && rows % btlm::LANES == 0 && !input_major);
            guard(scale.has_value() && size_of(*scale) == rows * (columns / group));
        }
        guard(!bias.has_value() || size_of(*bias) == rows);
        matrix = {of, weight.data(), packed ? scale->data() : nullptr, bias ? bias->data() : nullptr, rows, columns, group,
                  input_major};
    }
};

// The cache of a layer, and the arrays that hold its memory.
struct PyCache {
    btlm::Cache cache;
    Array<> keys, values;
    std::optional<OutHalves> key_scales, value_scales;
    Table table;

    PyCache(const std::string& dtype, Array<> keys_, Array<> values_, std::optional<OutHalves> key_scales_,
            std::optional<OutHalves> value_scales_, Table table_, int64_t pages, int64_t heads, int64_t head_dim)
        : keys(keys_), values(values_), key_scales(key_scales_), value_scales(value_scales_), table(table_) {
        const btlm::Dtype of = dtype_of(dtype);
        const bool packed = btlm::packed(of);
        const auto slots = static_cast<int64_t>(table.shape(0)), blocks = static_cast<int64_t>(table.shape(1));
        guard(slots > 0 && heads > 0 && blocks > 0 && pages > 0);
        guard(head_dim > 0 && head_dim <= btlm::MAX_HEAD_DIM);
        const int64_t width = (head_dim + btlm::LANES - 1) / btlm::LANES * btlm::LANES;
        guard(pages <= MOST / heads / btlm::KEY_BLOCK / width && blocks <= MOST / btlm::KEY_BLOCK);
        const int64_t tokens = pages * heads * btlm::KEY_BLOCK, bytes = tokens * width * btlm::bits(of) / 8;
        guard(static_cast<int64_t>(keys.nbytes()) == bytes && static_cast<int64_t>(values.nbytes()) == bytes);
        guard(!packed || (key_scales && value_scales && size_of(*key_scales) == tokens && size_of(*value_scales) == tokens));
        cache = {of, keys.data(), values.data(), packed ? key_scales->data() : nullptr,
                 packed ? value_scales->data() : nullptr, table.data(), pages, slots, heads,
                 blocks * btlm::KEY_BLOCK, head_dim, width};
    }

    // Whether the slot has pages of this cache for tokens before `end`.
    bool has_pages(int64_t slot, int64_t end) const {
        const int32_t* pages = cache.table + slot * (cache.capacity / btlm::KEY_BLOCK);
        return std::all_of(pages, pages + (end + btlm::KEY_BLOCK - 1) / btlm::KEY_BLOCK,
                           [&](int32_t page) { return page >= 0 && page < cache.pages; });
    }
};

std::unique_ptr<btlm::Operations> start(const btlm::Path* path, int threads) {
    try {
        return std::make_unique<btlm::Operations>(path, threads);
    } catch (const std::system_error&) {
        throw std::invalid_argument(std::to_string(threads) + " threads are more than the system gives; use fewer");
    }
}

const btlm::Path* path_of(const std::string& name) {
    for (const auto paths : {btlm::available_paths, btlm::emulated_paths})
        for (const btlm::Path* path : paths())
            if (name == path->name) return path;
    throw std::invalid_argument("this machine cannot run the instruction set " + name);
}

// Operations on one instruction set with threads of their own; one call runs at a time.
class PyKernels {
public:
    PyKernels(const std::string& name, int threads)
        : path(path_of(name)), count(std::max(threads, 1)), operations(start(path, count)), process(getpid()) {}

    ~PyKernels() {
        if (process != getpid()) (void)operations.release();  // nobody can join threads that a fork left behind
    }

    std::string name() const { return path->name; }
    int threads() const { return count; }

    static PyMatrix* matrix(const PyKernels&, const std::string& dtype, Any weight, std::optional<Halves> scale,
                            std::optional<Floats> bias, int64_t rows, int64_t columns, int group, bool input_major) {
        return new PyMatrix(dtype, weight, scale, bias, rows, columns, group, input_major);
    }

    static PyCache* cache(const PyKernels&, const std::string& dtype, Array<> keys, Array<> values,
                          std::optional<OutHalves> key_scales, std::optional<OutHalves> value_scales, Table table,
                          int64_t pages, int64_t heads, int64_t head_dim) {
        return new PyCache(dtype, keys, values, key_scales, value_scales, table, pages, heads, head_dim);
    }

    void linear(const Rows& x, const PyMatrix& matrix, const OutRows& out, const PyMatrix* gate, bool add) {
        const btlm::Matrix& m = matrix.matrix;
        const auto tokens = static_cast<int64_t>(x.shape(0));
        guard(is(x, tokens, m.columns) && is(out, tokens, m.rows));
        if (gate != nullptr) {
            const btlm::Matrix& g = gate->matrix;
            guard(g.dtype == m.dtype && g.rows == m.rows && g.columns == m.columns && g.group == m.group &&
                  g.input_major == m.input_major);
        }
        if (tokens == 0) return;
        run([&] {
            operations->linear(m, gate != nullptr ? &gate->matrix : nullptr, x.data(), m.columns, tokens,
                               {out.data(), m.rows, add});
        });
    }

    void layer_norm(const Rows& x, const Floats& weight, const Floats& bias, float eps, const OutRows& out) {
        const auto tokens = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
        guard(size_of(weight) == columns && size_of(bias) == columns && is(out, tokens, columns));
        run([&] { operations->layer_norm(x.data(), weight.data(), bias.data(), eps, tokens, columns, out.data()); });
    }

    void embed(const Ids& ids, const PyMatrix& matrix, float factor, const OutRows& out) {
        const btlm::Matrix& m = matrix.matrix;
        guard(!m.input_major && is(out, size_of(ids), m.columns));
        for (size_t i = 0; i < ids.size(); ++i) guard(ids.data()[i] >= 0 && ids.data()[i] < m.rows);
        run([&] { operations->embed(m, ids.data(), size_of(ids), factor, out.data()); });
    }

    void attend(const Rows& qkv, const PyCache& cache, const Segments& segments, const Floats& slopes, float scale,
                const OutRows& out) {
        const btlm::Cache& c = cache.cache;
        const auto tokens = static_cast<int64_t>(qkv.shape(0));
        const int64_t width = c.heads * c.head_dim;
        guard(is(qkv, tokens, 3 * width) && is(out, tokens, width) && size_of(slopes) == c.heads);
        static_assert(sizeof(btlm::Segment) == 4 * sizeof(int64_t));
        const auto* first = reinterpret_cast<const btlm::Segment*>(segments.data());
        const auto number = static_cast<int64_t>(segments.shape(0));
        for (const btlm::Segment* s = first; s < first + number; ++s) {
            guard(s->count > 0 && s->row >= 0 && s->count <= tokens - s->row);
            guard(s->slot >= 0 && s->slot < c.slots && s->start >= 0 && s->count <= c.capacity - s->start);
            guard(cache.has_pages(s->slot, s->start + s->count));
        }
        run([&] { operations->attend(c, qkv.data(), first, number, slopes.data(), scale, out.data()); });
    }

    int64_t sum_bytes(const Bytes& bytes) {
        int64_t sum = 0;
        run([&] { sum = operations->sum_bytes(bytes.data(), size_of(bytes)); });
        return sum;
    }

private:
    template <class Body>
    void run(const Body& body) {
        if (process != getpid()) {  // a fork has no threads but the one that forked, nor those that held the lock
            auto own = start(path_of(path->name), count);  // which may have to be allowed again
            (void)operations.release();
            operations = std::move(own);
            new (&busy) std::mutex;
            process = getpid();
        }
        nb::gil_scoped_release free;  // after a fork, the lock of the interpreter protects what is above
        std::lock_guard<std::mutex> alone(busy);
        body();
    }

    const btlm::Path* path;
    int count;
    std::mutex busy;
    std::unique_ptr<btlm::Operations> operations;
    int process;
};

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const btlm::Path* path : btlm::available_paths()) names.emplace_back(path->name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    // Arrays are never converted: a copy of `out` would receive the result, and be lost.
    nb::class_<PyMatrix>(m, "Matrix");
    nb::class_<PyCache>(m, "Cache");
    nb::class_<PyKernels>(m, "Kernels")
        .def(nb::init<const std::string&, int>(), "name"_a, "threads"_a)
        .def_prop_ro("name", &PyKernels::name)
        .def_prop_ro("threads", &PyKernels::threads)
        .def("matrix", &PyKernels::matrix, "dtype"_a, "weight"_a.noconvert(), "scale"_a.noconvert().none(),
             "bias"_a.noconvert().none(), "rows"_a, "columns"_a, "group"_a, "input_major"_a)
        .def("cache", &PyKernels::cache, "dtype"_a, "keys"_a.noconvert(), "values"_a.noconvert(),
             "key_scales"_a.noconvert().none(), "value_scales"_a.noconvert().none(), "table"_a.noconvert(), "pages"_a,
             "heads"_a, "head_dim"_a)
        .def("linear", &PyKernels::linear, "x"_a.noconvert(), "matrix"_a, "out"_a.noconvert(), "gate"_a.none(), "add"_a)
        .def("layer_norm", &PyKernels::layer_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(), "eps"_a,
             "out"_a.noconvert())
        .def("embed", &PyKernels::embed, "ids"_a.noconvert(), "matrix"_a, "factor"_a, "out"_a.noconvert())
        .def("attend", &PyKernels::attend, "qkv"_a.noconvert(), "cache"_a, "segments"_a.noconvert(), "slopes"_a.noconvert(),
             "scale"_a, "out"_a.noconvert())
        .def("sum_bytes", &PyKernels::sum_bytes, "values"_a.noconvert());
    m.def("instruction_sets", &instruction_sets);
}
