//! \file
//! The few functions of the C++ run-time library that the plugin library calls, so that it needs no libstdc++.so.6 of some version
//! or later: nothing but the C library. Nobody else sees them (exports.map). They leave out what cannot happen here: the library
//! neither throws nor allocates by a plain `new`. The code of run-time type information, which TensorRT may look at, is linked from
//! libsupc++.a (CMakeLists.txt). Not in src/, so that a build with sanitizers has the real ones.

#include <cstdlib>
#include <new>

void* operator new(std::size_t size, std::nothrow_t const& /*tag*/) noexcept
{
    return std::malloc(size == 0 ? 1 : size);
}

void operator delete(void* pointer) noexcept
{
    std::free(pointer);
}

void operator delete(void* pointer, std::nothrow_t const& /*tag*/) noexcept
{
    std::free(pointer);
}

// Compilers call it where a destructor's class is known, unless told otherwise.
void operator delete(void* pointer, std::size_t /*size*/) noexcept
{
    std::free(pointer);
}

namespace std
{
nothrow_t const nothrow{};

//! What std::mutex::lock() calls when it fails: only for a mutex that is not one any more.
[[noreturn]] void __throw_system_error(int /*error*/)
{
    abort();
}
} // namespace std

//! In the place of a pure virtual function: called only through an object that is being destroyed.
extern "C" void __cxa_pure_virtual()
{
    std::abort();
}
