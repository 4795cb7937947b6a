// SPDX-License-Identifier: Apache-2.0
//
// Muon and its matrix product on every target that this CPU has: same bits as the plain reference,
// and the iteration beside its definition in fp64. Beside torch: optimizers_vs_torch.py.
#include "kernels/cpu/muon.h"

#include <algorithm>
#include <cmath>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/reference.h"
#include "tests/kernels/arrays.h"

namespace zerod::kernels {
namespace {

using MuonTest = TargetTest;

INSTANTIATE_TEST_SUITE_P(Targets, MuonTest, testing::Values("SCALAR", "NEON", "AVX2", "AVX3"),
                         ParamName);

constexpr NewtonSchulz kMethods[] = {NewtonSchulz::kStandard, NewtonSchulz::kGram};

// --- The product -----------------------------------------------------------------------------

struct Size {
  size_t rows, depth, columns;
};
const Size kProducts[] = {{1, 1, 1},   {1, 300, 1},   {5, 3, 31},    {6, 256, 32},  {7, 257, 33},
                          {96, 64, 16}, {97, 513, 65}, {13, 20, 513}, {200, 7, 530}, {2, 1030, 3}};

void ExpectProductMatches(MatrixProduct product) {
  const size_t size = product.rows * product.columns;
  std::vector<float> scratch(kProductScratch);
  Guarded<float> out(size, 1, 5), expected = out;
  Multiply(product, out.ptr(), scratch.data());
  reference::Multiply(product, expected.ptr());
  ExpectSame(out.data, expected.data, "product");
}

TEST_P(MuonTest, ProductMatchesReference) {
  for (const Size& size : kProducts) {
    const std::vector<float> a = RandomFloats(size.rows * size.depth, 1, false);
    const std::vector<float> b = RandomFloats(size.depth * size.columns, 2, false);
    const std::vector<float> addend = RandomFloats(size.rows * size.columns, 3, false);
    const MatrixView a_rows{a.data(), size.depth, 1}, a_columns{a.data(), 1, size.rows};
    const MatrixView b_rows{b.data(), size.columns, 1}, b_columns{b.data(), 1, size.depth};
    for (const MatrixView& a_view : {a_rows, a_columns}) {
      for (const MatrixView& b_view : {b_rows, b_columns}) {
        MatrixProduct product{a_view, b_view, size.rows, size.depth, size.columns};
        ExpectProductMatches(product);
        product.addend = addend.data();
        product.addend_scale = 3.4445f;
        ExpectProductMatches(product);
      }
    }
  }
}

TEST_P(MuonTest, ProductIsAProduct) {
  // 3 x 2 times 2 x 2, plus 10 times ones.
  const float a[] = {1, 2, 3, 4, 5, 6}, b[] = {1, -1, 2, 0}, ones[] = {1, 1, 1, 1, 1, 1};
  std::vector<float> out(6), scratch(kProductScratch);
  Multiply({.a = {a, 2, 1},
            .b = {b, 2, 1},
            .rows = 3,
            .depth = 2,
            .columns = 2,
            .addend = ones,
            .addend_scale = 10},
           out.data(), scratch.data());
  EXPECT_THAT(out, testing::ElementsAre(15, 9, 21, 7, 27, 5));
}

// Half the work, and the same bits: each product of two numbers is the other's, turned round.
TEST_P(MuonTest, SymmetricProductIsTheWholeOne) {
  for (size_t rows : {1, 6, 33, 97, 530}) {
    const size_t depth = 70;
    const std::vector<float> x = RandomFloats(rows * depth, 7, false);
    const MatrixView view{x.data(), depth, 1};
    MatrixProduct product{view, view.Transposed(), rows, depth, rows};
    std::vector<float> whole(rows * rows), half(rows * rows), scratch(kProductScratch);
    Multiply(product, whole.data(), scratch.data());
    product.symmetric = true;
    Multiply(product, half.data(), scratch.data());
    ExpectSame(half, whole, "symmetric product");
    ExpectProductMatches(product);
  }
}

// --- What is done on shards --------------------------------------------------------------------

TEST_P(MuonTest, MomentumMatchesReference) {
  for (const bool nesterov : {false, true}) {
    for (const double momentum : {0.95, 0.3}) {
      const MuonScalars s = MakeMuonScalars(0.02, momentum, nesterov, 0.1, 0.25);
      for (size_t n : kSizes) {
        for (size_t count : kCounts) {
          for (size_t shift : {0, 1, 35}) {
            Gradients grads(count, n, shift == 1);
            Guarded<float> m(n, shift, 11), u(n, shift / 2, 12), m2 = m, u2 = u;
            MuonMomentum(s, grads.pointers.data(), count, m.ptr(), u.ptr(), n);
            reference::MuonMomentum(s, grads.pointers.data(), count, m2.ptr(), u2.ptr(), n);
            ExpectSame(m.data, m2.data, "m");
            ExpectSame(u.data, u2.data, "u");
          }
        }
      }
    }
  }
}

template <class T>
void ExpectApplyMatches(size_t n, size_t shift) {
  const MuonScalars s = MakeMuonScalars(0.02, 0.95, true, 0.1, 1);
  Guarded<float> u(n, shift, 13, shift == 1), p(n, shift / 2, 14, shift == 1), p2 = p, p3 = p;
  Guarded<T> copy(n, shift, 15), copy2 = copy;
  MuonApply(s, u.ptr(), p.ptr(), copy.ptr(), n);
  reference::MuonApply(s, u.ptr(), p2.ptr(), copy2.ptr(), n);
  ExpectSame(p.data, p2.data, "p");
  ExpectSame16(copy.data, copy2.data, "copy");
  MuonApply(s, u.ptr(), p3.ptr(), nullptr, n);
  ExpectSame(p3.data, p2.data, "p without copy");
}

TEST_P(MuonTest, ApplyMatchesReference) {
  for (size_t n : kSizes) {
    for (size_t shift : {0, 1, 35}) {
      ExpectApplyMatches<bfloat16>(n, shift);
      ExpectApplyMatches<float16>(n, shift);
    }
  }
}

TEST_P(MuonTest, MomentumAndApplyByHand) {
  const MuonScalars s = MakeMuonScalars(0.5, 0.75, true, 0.25, 0.5);
  const std::vector<float> g(40, 8.0f);
  std::vector<float> m(40, 0.0f), u(40), p(40, 2.0f);
  const float* grads[] = {g.data()};
  MuonMomentum(s, grads, 1, m.data(), u.data(), g.size());
  EXPECT_THAT(m, testing::Each(1.0f));                  // a quarter of the way from 0 to 4
  EXPECT_THAT(u, testing::Each(1.75f));                 // three quarters of the way from 4 to m
  MuonApply(s, u.data(), p.data(), nullptr, p.size());
  EXPECT_THAT(p, testing::Each(1.75f - 0.875f));
}

// --- The iteration -----------------------------------------------------------------------------

// By the definition, in fp64: the matrix is turned so that it is wide, and nothing is saved.
std::vector<double> Textbook(const std::vector<float>& u, size_t rows, size_t columns) {
  const size_t s = std::min(rows, columns), longer = std::max(rows, columns);
  const auto index = [&](size_t i, size_t j) {
    return rows > columns ? j * columns + i : i * columns + j;
  };
  double squares = 0;
  for (float value : u) squares += static_cast<double>(value) * value;
  std::vector<double> x(u.size());
  for (size_t i = 0; i < u.size(); ++i) x[i] = u[i] / (std::sqrt(squares) + 1e-7);
  for (int round = 0; round < 5; ++round) {
    std::vector<double> a(s * s), b(s * s), next(u.size());
    for (size_t i = 0; i < s; ++i) {
      for (size_t j = 0; j < s; ++j) {
        for (size_t k = 0; k < longer; ++k) a[i * s + j] += x[index(i, k)] * x[index(j, k)];
      }
    }
    for (size_t i = 0; i < s; ++i) {
      for (size_t j = 0; j < s; ++j) {
        double squared = 0;
        for (size_t k = 0; k < s; ++k) squared += a[i * s + k] * a[k * s + j];
        b[i * s + j] = -4.7750 * a[i * s + j] + 2.0315 * squared;
      }
    }
    for (size_t i = 0; i < s; ++i) {
      for (size_t j = 0; j < longer; ++j) {
        double sum = 3.4445 * x[index(i, j)];
        for (size_t k = 0; k < s; ++k) sum += b[i * s + k] * x[index(k, j)];
        next[index(i, j)] = sum;
      }
    }
    x = next;
  }
  const double scale = std::sqrt(std::max(1.0, static_cast<double>(rows) / columns));
  for (double& value : x) value *= scale;
  return x;
}

std::vector<float> Orthogonalized(NewtonSchulz method, std::vector<float> u, size_t rows,
                                  size_t columns) {
  std::vector<float> scratch(OrthogonalizeScratch(method, rows, columns), NAN);
  Orthogonalize(method, u.data(), rows, columns, scratch.data());
  return u;
}

struct Shape {
  size_t rows, columns;
};
const Shape kShapes[] = {{1, 1},  {1, 7},   {7, 1},   {16, 16}, {33, 65},
                         {65, 33}, {20, 130}, {150, 40}, {40, 200}, {97, 98}};

void ExpectFollowsTextbook(const std::vector<float>& u, const Shape& shape, double allowed) {
  const std::vector<double> expected = Textbook(u, shape.rows, shape.columns);
  for (NewtonSchulz method : kMethods) {
    const std::vector<float> actual = Orthogonalized(method, u, shape.rows, shape.columns);
    double worst = 0;
    for (size_t i = 0; i < u.size(); ++i) {
      worst = std::max(worst, std::fabs(actual[i] - expected[i]));
    }
    EXPECT_LT(worst, allowed) << shape.rows << " x " << shape.columns << ", method "
                              << static_cast<int>(method);
  }
}

TEST_P(MuonTest, OrthogonalizeFollowsTheTextbook) {
  for (const Shape& shape : kShapes) {
    ExpectFollowsTextbook(RandomFloats(shape.rows * shape.columns, 21, false), shape, 1e-5);
  }
}

// A gradient is often nearly of low rank, and small singular values are where rounding errors grow:
// five rounds raise them by up to 3.4445^5 = 485.
TEST_P(MuonTest, OrthogonalizeFollowsTheTextbookAtLowRank) {
  for (const Shape& shape : {Shape{48, 200}, Shape{150, 40}}) {
    const size_t rank = 3;
    const std::vector<float> left = RandomFloats(shape.rows * rank, 25, false);
    const std::vector<float> right = RandomFloats(shape.columns * rank, 26, false);
    const std::vector<float> noise = RandomFloats(shape.rows * shape.columns, 27, false);
    std::vector<float> u(noise.size());
    for (size_t i = 0; i < u.size(); ++i) {
      u[i] = 1e-4f * noise[i];
      for (size_t k = 0; k < rank; ++k) {
        u[i] += left[i / shape.columns * rank + k] * right[i % shape.columns * rank + k];
      }
    }
    ExpectFollowsTextbook(u, shape, 2e-5);
  }
}

TEST_P(MuonTest, OrthogonalizeHasTheSameBitsOnEveryTarget) {
  for (const Shape& shape : kShapes) {
    const std::vector<float> u = RandomFloats(shape.rows * shape.columns, 22, false);
    for (NewtonSchulz method : kMethods) {
      const std::vector<float> actual = Orthogonalized(method, u, shape.rows, shape.columns);
      ASSERT_TRUE(ForceTarget("SCALAR"));
      const std::vector<float> expected = Orthogonalized(method, u, shape.rows, shape.columns);
      ASSERT_TRUE(ForceTarget(GetParam()));
      ExpectSame(actual, expected, "orthogonalized");
    }
  }
}

// A tall matrix gives the transpose of what its transpose gives, but for the scale.
TEST_P(MuonTest, TallIsTheTransposeOfWide) {
  const size_t rows = 128, columns = 32;  // scale 2
  const std::vector<float> tall = RandomFloats(rows * columns, 23, false);
  std::vector<float> wide(tall.size());
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < columns; ++j) wide[j * rows + i] = tall[i * columns + j];
  }
  for (NewtonSchulz method : kMethods) {
    const std::vector<float> of_wide = Orthogonalized(method, wide, columns, rows);
    const std::vector<float> of_tall = Orthogonalized(method, tall, rows, columns);
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < columns; ++j) {
        // The norm's lanes see the elements in another order.
        ASSERT_NEAR(of_tall[i * columns + j], 2 * of_wide[j * rows + i], 1e-5);
      }
    }
  }
}

// Whatever a gradient's scale; and none stays none.
TEST_P(MuonTest, OrthogonalizeForgetsTheScale) {
  const size_t rows = 24, columns = 60;
  std::vector<float> u = RandomFloats(rows * columns, 24, false);
  for (NewtonSchulz method : kMethods) {
    const std::vector<float> expected = Orthogonalized(method, u, rows, columns);
    std::vector<float> huge = u;
    for (float& value : huge) value *= 0x1p100f;
    const std::vector<float> actual = Orthogonalized(method, huge, rows, columns);
    for (size_t i = 0; i < u.size(); ++i) ASSERT_NEAR(actual[i], expected[i], 1e-5);
    const std::vector<float> zeros(rows * columns, 0.0f);
    EXPECT_THAT(Orthogonalized(method, zeros, rows, columns), testing::Each(0.0f));
  }
}

}  // namespace
}  // namespace zerod::kernels
