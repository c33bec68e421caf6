// Lets tensors that know no device of their own live "on" CUDA in a PyTorch built without it, forward and backward: a device
// guard that does nothing, and hooks that say one device is there. Built by tests/helpers/pretended_gpu.py.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Device here() const { return {c10::DeviceType::CUDA, 0}; }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return here(); }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, here()); }
  c10::Stream getNewStream(c10::Device, int) const override { return getStream(here()); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(here()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
const Guard guard;
}
extern "C" int pretend_cuda() {
  if (!c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  // libtorch_cpu has made its stub of the hooks while it was loaded: lend it our methods (neither has data of its own)
  static const Hooks hooks{at::CUDAHooksArgs{}};
  const auto& stub = at::detail::getCUDAHooks();
  if (!stub.hasCUDA()) *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&stub)) = *reinterpret_cast<void* const*>(&hooks);
  return at::detail::getCUDAHooks().hasCUDA();
}
