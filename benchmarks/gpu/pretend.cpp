// What autograd asks of a GPU, for a torch without CUDA: the type of the accelerator, hooks, and a guard of streams that does nothing.
// Loaded before torch, so that torch's own calls reach this `getAccelerator`.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>
#include <optional>

namespace {

const c10::Device gpu(c10::DeviceType::CUDA, 0);

struct Hooks final : at::CUDAHooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const noexcept override { return gpu; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, gpu); }
};

// torch has made its hooks by now and offers no way to exchange them; neither class has members
[[maybe_unused]] const auto* hooks = new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();

}  // namespace

namespace at::accelerator {

__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }

}  // namespace at::accelerator

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
