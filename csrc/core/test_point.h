// Named points at which a test may end the process. Builds without MOE_NATIVE_TEST_POINTS have nothing there.
#pragma once

#ifdef MOE_NATIVE_TEST_POINTS
namespace moe_native {
void at_test_point(const char* name) noexcept;  // tests/cpp/test_point.cc
}
#define MOE_TEST_POINT(name) ::moe_native::at_test_point(name)
#else
#define MOE_TEST_POINT(name) static_cast<void>(0)
#endif
