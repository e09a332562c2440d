//! \file
//! glibc 2.34 moved dlopen() and its like from libdl to libc, under a new symbol version that no older Linux has. The functions
//! under their first version, which every glibc keeps, are the same. To be included where they are called.
#pragma once

#include <cstdlib> // __GLIBC__

#if defined(__GLIBC__) && defined(__x86_64__)
#define LLAMA_EXPORT_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define LLAMA_EXPORT_FIRST_GLIBC "GLIBC_2.17"
#endif

#ifdef LLAMA_EXPORT_FIRST_GLIBC
__asm__(".symver dlopen, dlopen@" LLAMA_EXPORT_FIRST_GLIBC);
__asm__(".symver dlsym, dlsym@" LLAMA_EXPORT_FIRST_GLIBC);
__asm__(".symver dlclose, dlclose@" LLAMA_EXPORT_FIRST_GLIBC);
__asm__(".symver dlerror, dlerror@" LLAMA_EXPORT_FIRST_GLIBC);
__asm__(".symver dladdr, dladdr@" LLAMA_EXPORT_FIRST_GLIBC);
#endif
