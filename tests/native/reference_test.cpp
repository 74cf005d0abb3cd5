// Kernels of every kind of argument against plain C++, on a GPU: pointers, numbers, tuples and descriptors, in Triton and
// Gluon.
//
// sm_80's code runs on every GPU since the A100, as a cubin or as PTX; sm_90's on an H100 or H200. All other kernels are tested
// through Python with this library, see `python` in CMakeLists.txt.
#include "reference.h"

#include <algorithm>

namespace {

constexpr double kBfloat16 = 1.0 / 256, kFloat32 = 1e-5;  // relative errors
constexpr double kEps = 1.1920928955078125e-07;           // of the norms

std::string at(const char* what, int architecture) {
    return std::string(what) + ", sm_" + std::to_string(architecture);
}

nk_argument bfloat16(void* pointer) {
    return nk_pointer(pointer, NK_BFLOAT16);
}
nk_argument float32(void* pointer) {
    return nk_pointer(pointer, NK_FLOAT32);
}

// y = x·rstd of x + update, and backward dx = rstd·(dy − y·mean(dy·y)) + dtotal.
void test_rms_norm(Device& device, int architecture) {
    const int64_t rows = 77, width = 1280, size = rows * width;
    Random random;
    const Numbers x = random.bfloat16(size), update = random.bfloat16(size), dy = random.bfloat16(size),
                  dtotal = random.bfloat16(size);
    void *x_ptr = copy_bfloat16(device, x), *update_ptr = copy_bfloat16(device, update), *dy_ptr = copy_bfloat16(device, dy),
         *dtotal_ptr = copy_bfloat16(device, dtotal);
    void *total_ptr = results_of(device, 2 * size), *y_ptr = results_of(device, 2 * size),
         *dx_ptr = results_of(device, 2 * size), *rstd_ptr = results_of(device, 4 * rows);
    const Kernel forward("rms_norm_forward", "bfloat16", "1280", "add, rstd", architecture);
    forward.launch(ceil_div(rows, forward.constant("ROWS")), 1,
                   {bfloat16(x_ptr), bfloat16(update_ptr), bfloat16(total_ptr), bfloat16(y_ptr), float32(rstd_ptr),
                    nk_integer(rows), nk_integer(width), nk_integer(width)});
    const Kernel backward("rms_norm_backward", "bfloat16", "1280", "add", architecture);
    backward.launch(ceil_div(rows, backward.constant("ROWS")), 1,
                    {bfloat16(dy_ptr), bfloat16(dtotal_ptr), bfloat16(y_ptr), float32(rstd_ptr), bfloat16(dx_ptr),
                     nk_integer(rows), nk_integer(width), nk_integer(width)});

    const Numbers total_found = read_bfloat16(device, total_ptr, size), y_found = read_bfloat16(device, y_ptr, size);
    Numbers total(size), y(size), rstd(rows), dx(size);
    for (int64_t row = 0; row < rows; ++row) {
        double squares = 0, projection = 0;
        for (int64_t i = row * width; i < (row + 1) * width; ++i) {
            total[i] = x[i] + update[i];
            squares += total_found[i] * total_found[i];
            projection += dy[i] * y_found[i];
        }
        rstd[row] = 1 / std::sqrt(squares / width + kEps);
        for (int64_t i = row * width; i < (row + 1) * width; ++i) {
            y[i] = total_found[i] * rstd[row];
            dx[i] = rstd[row] * (dy[i] - y_found[i] * projection / width) + dtotal[i];
        }
    }
    check_close(at("rms_norm_forward, sum", architecture), total_found, total, kBfloat16, 1e-6);
    check_close(at("rms_norm_forward, y", architecture), y_found, y, kBfloat16, 1e-6);
    check_close(at("rms_norm_forward, rstd", architecture), read_float32(device, rstd_ptr, rows), rstd, kFloat32, 0);
    check_close(at("rms_norm_backward", architecture), read_bfloat16(device, dx_ptr, size), dx, kBfloat16, 1e-5);
}

// rstd of rows from partial sums of squares, or r²·sum/width.
void test_finish_rows(Device& device, int architecture) {
    const int64_t rows = 1001, parts = 20, width = 1280;
    Random random;
    Numbers sums = random.float32(rows * parts), rstd = random.float32(rows), wanted(rows);
    for (double& value : sums) {
        value = std::fabs(value);
    }
    for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) {
            sum += sums[part * rows + row];
        }
        wanted[row] = rstd[row] * rstd[row] * sum / width;
    }
    void* out = results_of(device, 4 * rows);
    const Kernel kernel("finish_rows", "float32", "20", "backward, 1280 wide", architecture);
    kernel.launch(ceil_div(rows, kernel.constant("ROWS")), 1,
                  {float32(copy_float32(device, sums)), float32(copy_float32(device, rstd)), float32(out), nk_integer(rows),
                   nk_integer(parts)});
    check_close(at("finish_rows", architecture), read_float32(device, out, rows), wanted, kFloat32, 1e-9);
}

// Momentum: m += (1 − μ)(g − m), direction = g + μ(m − g), and the squares of the direction.
void test_nesterov_momentum(Device& device, int architecture) {
    const int64_t batch = 3, size = 10007, parts = 64;
    const double clip = 0.5, mu = 0.953125;
    Random random;
    const Numbers gradient = random.float32(batch * size), momentum = random.float32(batch * size);
    void *momentum_ptr = copy_float32(device, momentum), *direction_ptr = results_of(device, 2 * batch * size),
         *squares_ptr = results_of(device, 8 * batch * parts);
    const Kernel kernel("nesterov_momentum", "float32", "1638400", "float32 to bfloat16", architecture);
    kernel.launch(parts, batch,
                  {float32(copy_float32(device, gradient)), float32(momentum_ptr), bfloat16(direction_ptr),
                   nk_pointer(squares_ptr, NK_FLOAT64), float32(copy_float32(device, {clip})),
                   float32(copy_float32(device, {mu})), nk_integer(size)});
    const Numbers found = read_bfloat16(device, direction_ptr, batch * size);
    Numbers m(batch * size), direction(batch * size), squares(batch);
    for (int64_t i = 0; i < batch * size; ++i) {
        const double g = gradient[i] * clip;
        m[i] = momentum[i] + (1 - mu) * (g - momentum[i]);
        direction[i] = g + mu * (m[i] - g);
        squares[i / size] += found[i] * found[i];
    }
    Numbers found_squares(batch);
    const std::vector<double> partial = device.read<double>(squares_ptr, batch * parts);
    for (int64_t i = 0; i < batch * parts; ++i) {
        found_squares[i / parts] += partial[i];
    }
    check_close(at("nesterov_momentum", architecture), read_float32(device, momentum_ptr, batch * size), m, kFloat32, 1e-6);
    check_close(at("nesterov_momentum, direction", architecture), found, direction, kBfloat16, 1e-6);
    check_close(at("nesterov_momentum, squares", architecture), found_squares, squares, 1e-12, 0);
}

void test_apply_update(Device& device, int architecture) {
    const int64_t size = 10007;
    const double rate = 0.02, factor = 1.5;
    Random random;
    const Numbers weight = random.float32(size), update = random.bfloat16(size);
    Numbers wanted(size);
    for (int64_t i = 0; i < size; ++i) {
        wanted[i] = weight[i] - update[i] * factor * rate;
    }
    void *weight_ptr = copy_float32(device, weight), *copy_ptr = results_of(device, 2 * size);
    const Kernel kernel("apply_update", "float32", "1638400", "bfloat16 update, bfloat16 copy", architecture);
    kernel.launch(ceil_div(size, kernel.constant("BLOCK")), 1,
                  {float32(weight_ptr), bfloat16(copy_bfloat16(device, update)), bfloat16(copy_ptr),
                   float32(copy_float32(device, {rate})), nk_integer(size), nk_number(factor)});
    check_close(at("apply_update", architecture), read_float32(device, weight_ptr, size), wanted, kFloat32, 1e-6);
    check_close(at("apply_update, copy", architecture), read_bfloat16(device, copy_ptr, size), wanted, kBfloat16, 1e-6);
}

void test_adamw(Device& device, int architecture) {
    const int64_t size = 10007;
    const double clip = 0.5, rate = 0.01, factor = 2, new1 = 0.25, new2 = 0.0625, eps = 1e-10, bias1 = 0.5, bias2 = 0.75;
    Random random;
    const Numbers weight = random.float32(size), gradient = random.float32(size), mean = random.float32(size);
    Numbers variance = random.float32(size), new_mean(size), new_variance(size), wanted(size);
    for (int64_t i = 0; i < size; ++i) {
        variance[i] = std::fabs(variance[i]) + 0.125;
        const double g = gradient[i] * clip;
        new_mean[i] = mean[i] + new1 * (g - mean[i]);
        new_variance[i] = variance[i] + new2 * (g * g - variance[i]);
        wanted[i] = weight[i] - new_mean[i] / bias1 / (std::sqrt(new_variance[i] / bias2) + eps) * factor * rate;
    }
    void *weight_ptr = copy_float32(device, weight), *mean_ptr = copy_float32(device, mean),
         *variance_ptr = copy_float32(device, variance);
    const Kernel kernel("adamw", "float32", "1638400", "float32 gradient, no copy", architecture);
    kernel.launch(ceil_div(size, kernel.constant("BLOCK")), 1,
                  {float32(weight_ptr), float32(copy_float32(device, gradient)), float32(mean_ptr), float32(variance_ptr),
                   float32(weight_ptr), float32(copy_float32(device, {clip})), float32(copy_float32(device, {rate})),
                   float32(copy_float32(device, {bias1, bias2})), nk_integer(1), nk_integer(size), nk_number(factor),
                   nk_number(new1), nk_number(new2), nk_number(eps)});
    check_close(at("adamw, mean", architecture), read_float32(device, mean_ptr, size), new_mean, kFloat32, 1e-6);
    check_close(at("adamw, variance", architecture), read_float32(device, variance_ptr, size), new_variance, kFloat32, 1e-6);
    check_close(at("adamw, weight", architecture), read_float32(device, weight_ptr, size), wanted, kFloat32, 1e-6);
}

struct Matrix {
    int64_t rows, columns;
    Numbers values;
    void* memory;
    double operator()(int64_t row, int64_t column) const { return values[row * columns + column]; }
    nk_matrix described() const { return {memory, NK_BFLOAT16, 2, {rows, columns}, {columns, 1}}; }
};

Matrix random_matrix(Device& device, Random& random, int64_t rows, int64_t columns, double scale) {
    Numbers values = random.bfloat16(rows * columns, scale);
    void* memory = copy_bfloat16(device, values);
    return {rows, columns, std::move(values), memory};
}

// dx = dz·W − c·x + dy: a product whose epilogue reads two matrices; on sm_90 in Gluon, with descriptors.
void test_product_with_epilogue(Device& device, int architecture) {
    const int64_t m = 512, n = 1280, k = 512;
    Random random;
    const Matrix dz = random_matrix(device, random, m, k, 1), weight = random_matrix(device, random, k, n, 0.05),
                 x = random_matrix(device, random, m, n, 1), dy = random_matrix(device, random, m, n, 1);
    const Numbers c = random.float32(m);
    Numbers wanted(m * n);
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t step = 0; step < k; ++step) {
            for (int64_t j = 0; j < n; ++j) {
                wanted[i * n + j] += dz(i, step) * weight(step, j);
            }
        }
        for (int64_t j = 0; j < n; ++j) {
            wanted[i * n + j] += dy(i, j) - c[i] * x(i, j);
        }
    }
    void* const out = results_of(device, 2 * m * n);
    void* const c_ptr = copy_float32(device, c);
    const Kernel kernel("relu2_mlp_input_gradient", "bfloat16", "16384x1280x5120", "residual", architecture);
    const int64_t tiles = ceil_div(m, kernel.constant("BLOCK_M")) * ceil_div(n, kernel.constant("BLOCK_N"));
    if (architecture == 90) {
        const nk_matrix described[] = {
            dz.described(), weight.described(), {out, NK_BFLOAT16, 2, {m, n}, {n, 1}}, x.described(), dy.described()};
        std::vector<nk_argument> arguments;
        for (const nk_matrix& matrix : described) {
            arguments.push_back(nk_matrix_argument(&matrix));
        }
        for (const nk_argument& more :
             {float32(c_ptr), nk_integer(1), nk_integer(m), nk_integer(n), nk_integer(k), nk_integer(tiles), nk_none()}) {
            arguments.push_back(more);
        }
        kernel.launch(std::min<int64_t>(tiles, device.multiprocessors()), 1, arguments);
    } else {
        kernel.launch(tiles, 1,
                      {bfloat16(dz.memory), bfloat16(weight.memory), bfloat16(out), bfloat16(x.memory), bfloat16(dy.memory),
                       float32(c_ptr), nk_integer(1), nk_integer(tiles), nk_integer(tiles), nk_integer(m), nk_integer(n),
                       nk_integer(k), nk_integer(k), nk_integer(n), nk_integer(n), nk_integer(n), nk_integer(n)});
    }
    check_close(at("relu2_mlp_input_gradient", architecture), read_bfloat16(device, out, m * n), wanted, kBfloat16, 1e-4);
}

// A batch of products, x·y; on sm_90 with descriptors of the whole batch, in Triton.
void test_batched_product(Device& device, int architecture) {
    const int64_t batch = 2, size = 256;
    Random random;
    const Matrix x = random_matrix(device, random, batch * size, size, 1),
                 y = random_matrix(device, random, batch * size, size, 1);
    Numbers wanted(batch * size * size);
    for (int64_t row = 0; row < batch * size; ++row) {
        for (int64_t step = 0; step < size; ++step) {
            for (int64_t column = 0; column < size; ++column) {
                wanted[row * size + column] += x(row, step) * y(row / size * size + step, column);
            }
        }
    }
    void* const out = results_of(device, 2 * wanted.size());
    const Kernel kernel("matrix_product", "bfloat16", "1280x1280x1280", "product", architecture);
    const int64_t tiles = ceil_div(size, kernel.constant("BLOCK_M")) * ceil_div(size, kernel.constant("BLOCK_N"));
    const nk_matrix described[] = {x.described(), y.described()};
    std::vector<nk_argument> arguments = {bfloat16(x.memory), bfloat16(y.memory), bfloat16(out), bfloat16(out),
                                          bfloat16(out),      nk_number(1),       nk_none(),     nk_none()};
    if (kernel.constant("TMA") != 0) {
        arguments[0] = nk_matrix_argument(&described[0]);
        arguments[1] = nk_matrix_argument(&described[1]);
    }
    for (const int64_t number : {tiles, batch * tiles, size, size, size, size, size, size, size, size}) {
        arguments.push_back(nk_integer(number));
    }
    kernel.launch(batch * tiles, 1, arguments);
    check_close(at("matrix_product", architecture), read_bfloat16(device, out, wanted.size()), wanted, kBfloat16, 1e-3);
}

// Causal attention of heads whose norm bounds the scores; some queries of every head are checked.
void test_attention(Device& device, int architecture) {
    const int64_t batch = 2, tokens = 384, heads = 3, width = 128, columns = heads * width;
    Random random;
    Numbers heads_of[3];
    void* memory[3];
    for (int i = 0; i < 3; ++i) {
        heads_of[i] = random.bfloat16(batch * tokens * columns, i == 2 ? 1 : 0.5);
        memory[i] = copy_bfloat16(device, heads_of[i]);
    }
    void *out = results_of(device, 2 * batch * tokens * columns), *lse = results_of(device, 4 * batch * heads * tokens);
    const Kernel kernel("attention_forward", "bfloat16", "128xwhole", "training", architecture);
    if (architecture == 90) {
        const int64_t blocks = tokens / 128, total = batch * heads * blocks;
        void* const counter = device.copy(std::vector<int32_t>{0});
        nk_matrix described[4];
        void* const all[] = {memory[0], memory[1], memory[2], out};
        std::vector<nk_argument> arguments;
        for (int i = 0; i < 4; ++i) {
            described[i] = {all[i], NK_BFLOAT16, 2, {batch * tokens, columns}, {columns, 1}};
            arguments.push_back(nk_matrix_argument(&described[i]));
        }
        for (const nk_argument& more : {float32(lse), nk_pointer(counter, NK_INT32), nk_integer(tokens), nk_integer(blocks),
                                        nk_integer(heads), nk_integer(batch), nk_integer(1), nk_integer(total)}) {
            arguments.push_back(more);
        }
        kernel.launch(std::min<int64_t>(total, device.multiprocessors()), 1, arguments);
    } else {
        std::vector<nk_argument> arguments = {bfloat16(memory[0]),
                                              bfloat16(memory[1]),
                                              bfloat16(memory[2]),
                                              nk_pointer(nullptr, NK_NO_DTYPE),
                                              nk_pointer(nullptr, NK_NO_DTYPE),
                                              bfloat16(out),
                                              float32(lse)};
        for (const int64_t number : {int64_t{0}, tokens, tokens, heads, int64_t{1}, batch}) {
            arguments.push_back(nk_integer(number));
        }
        for (int i = 0; i < 3; ++i) {
            for (const int64_t stride : {tokens * columns, columns, width}) {
                arguments.push_back(nk_integer(stride));
            }
        }
        kernel.launch(batch * heads * ceil_div(tokens, kernel.constant("BLOCK_M")), 1, arguments);
    }
    const Numbers out_found = read_bfloat16(device, out, batch * tokens * columns);
    const Numbers lse_found = read_float32(device, lse, batch * heads * tokens);
    Numbers found, wanted, found_lse, wanted_lse;
    for (int64_t row = 0; row < batch * heads; ++row) {
        for (int64_t t = row % 5; t < tokens; t += 37) {
            const auto start = [&](int64_t token) { return (row / heads * tokens + token) * columns + row % heads * width; };
            Numbers sums(width);
            double total = 0;
            for (int64_t key = 0; key <= t; ++key) {
                double score = 0;
                for (int64_t i = 0; i < width; ++i) {
                    score += heads_of[0][start(t) + i] * heads_of[1][start(key) + i];
                }
                const double p = std::exp(score / std::sqrt(static_cast<double>(width)));
                total += p;
                for (int64_t i = 0; i < width; ++i) {
                    sums[i] += p * heads_of[2][start(key) + i];
                }
            }
            for (int64_t i = 0; i < width; ++i) {
                wanted.push_back(sums[i] / total);
                found.push_back(out_found[start(t) + i]);
            }
            wanted_lse.push_back(std::log(total));
            found_lse.push_back(lse_found[row * tokens + t]);
        }
    }
    // p is rounded to bfloat16: with few keys by a quarter of 2^-8 of the difference of two values
    check_close(at("attention_forward", architecture), found, wanted, kBfloat16, 1e-2);
    check_close(at("attention_forward, lse", architecture), found_lse, wanted_lse, kFloat32, 1e-3);
}

int run() {
    Device device;
    const nk_kernel* kernel = nullptr;
    std::vector<int> architectures = {80};
    if (nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, 0, &kernel) == NK_OK) {
        const nk_kernel* hopper = nullptr;
        if (nk_find("row_rstd", "bfloat16", "1280", "rstd", 0, 90, &hopper) == NK_OK && hopper == kernel) {
            architectures.push_back(90);
        }
    }
    for (const int architecture : architectures) {
        test_rms_norm(device, architecture);
        test_finish_rows(device, architecture);
        test_nesterov_momentum(device, architecture);
        test_apply_update(device, architecture);
        test_adamw(device, architecture);
        test_product_with_epilogue(device, architecture);
        test_batched_product(device, architecture);
        test_attention(device, architecture);
    }
    return finish();
}

}  // namespace

int main() {
    try {
        return run();
    } catch (const std::exception& error) {
        std::printf("no GPU: %s\n", error.what());
        return 77;  // skipped, to CTest
    }
}
