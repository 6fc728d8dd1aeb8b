//! What the C library and the standard library do for a program otherwise, for the agent in a
//! guest: the entry point, the heap, the panic handler, and the few functions that compiled code
//! calls by name. For a single thread only.

use alloc::vec::Vec;
use core::{
    alloc::{GlobalAlloc, Layout},
    arch::{asm, global_asm},
    cell::UnsafeCell,
    ffi::{CStr, c_char},
    fmt::Write,
    panic::PanicInfo,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use dlmalloc::Dlmalloc;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap, munmap};

use crate::{sys, text::Stderr};

global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {enter}",
    "ud2",
    enter = sym enter,
);

/// The stack as the kernel prepared it: argument count, arguments, null, environment, null.
static STACK: AtomicPtr<usize> = AtomicPtr::new(ptr::null_mut());

extern "C" fn enter(stack: *mut usize) -> ! {
    STACK.store(stack, Ordering::Relaxed);
    sys::exit(crate::start())
}

/// Returns this program's arguments.
pub(crate) fn args() -> Vec<Vec<u8>> {
    strings(1)
}

/// Returns this program's environment, as `KEY=value`.
pub(crate) fn environment() -> Vec<Vec<u8>> {
    // SAFETY: the kernel put the argument count there.
    let count = unsafe { *STACK.load(Ordering::Relaxed) };
    strings(count + 2)
}

/// Returns the strings of a null-terminated list that begins `skip` words above the start of the
/// stack.
fn strings(skip: usize) -> Vec<Vec<u8>> {
    let list = STACK.load(Ordering::Relaxed).cast::<*const c_char>();
    (skip..)
        // SAFETY: within a list that the kernel made and ended with a null, at which this stops.
        .map(|index| unsafe { *list.add(index) })
        .take_while(|string| !string.is_null())
        // SAFETY: the kernel's strings end with a zero byte and live as long as the program.
        .map(|string| unsafe { CStr::from_ptr(string) }.to_bytes().to_vec())
        .collect()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Stderr, "hearth-init: {info}");
    // When PID 1 exits, the kernel panics, which the monitor reports.
    sys::exit(101)
}

/// The heap: pages from the kernel, managed by dlmalloc.
struct Heap(UnsafeCell<Dlmalloc<Pages>>);

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(Dlmalloc::new_with_allocator(Pages)));

// SAFETY: there is one thread.
unsafe impl Sync for Heap {}

// SAFETY: dlmalloc keeps the contract; it is entered by one thread and does not call back.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above, here and below.
        unsafe { (*self.0.get()).malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { (*self.0.get()).calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { (*self.0.get()).free(memory, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { (*self.0.get()).realloc(memory, layout.size(), layout.align(), size) }
    }
}

/// Memory from the kernel.
struct Pages;

// SAFETY: gives out fresh anonymous mappings and takes back what it gave, whole or in part.
unsafe impl dlmalloc::Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let mapped = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        (mapped.map_or(ptr::null_mut(), <*mut _>::cast), size, 0)
    }

    fn remap(&self, memory: *mut u8, old: usize, new: usize, can_move: bool) -> *mut u8 {
        let flags = if can_move {
            MremapFlags::MAYMOVE
        } else {
            MremapFlags::empty()
        };
        // SAFETY: dlmalloc passes a mapping of its own.
        unsafe { mremap(memory.cast(), old, new, flags) }.map_or(ptr::null_mut(), <*mut _>::cast)
    }

    fn free_part(&self, memory: *mut u8, old: usize, new: usize) -> bool {
        // SAFETY: the tail of a mapping of dlmalloc's own that it no longer uses.
        unsafe { munmap(memory.add(new).cast(), old - new).is_ok() }
    }

    fn free(&self, memory: *mut u8, size: usize) -> bool {
        // SAFETY: a mapping of dlmalloc's own that it no longer uses.
        unsafe { munmap(memory.cast(), size).is_ok() }
    }

    fn can_release_part(&self, _: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        4096
    }
}

// The functions that compiled code calls by name. Each is one string instruction, so that the
// compiler cannot recognise the loop in it and make it call itself.

/// C's memcpy.
// SAFETY: C's contract is the caller's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: as above; the direction flag is clear, as the ABI requires.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// C's memmove.
// SAFETY: C's contract is the caller's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: copying forwards reads each byte before it is overwritten.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: as above, backwards; the direction flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// C's memset.
// SAFETY: C's contract is the caller's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: as above.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("eax") byte,
            options(nostack, preserves_flags));
    }
    to
}

/// C's memcmp.
// SAFETY: C's contract is the caller's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    let (above, below): (u8, u8);
    // SAFETY: as above. Equal flags to begin with: nothing is compared if the count is zero.
    unsafe {
        asm!("cmp eax, eax", "repe cmpsb", "seta {above}", "setb {below}",
            above = out(reg_byte) above, below = out(reg_byte) below,
            inout("rcx") count => _, inout("rsi") one => _, inout("rdi") other => _, out("eax") _,
            options(nostack, readonly));
    }
    i32::from(above) - i32::from(below)
}

/// Like memcmp, but only whether the result is zero matters.
// SAFETY: C's contract is the caller's.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: as above.
    unsafe { memcmp(one, other, count) }
}

/// C's strlen.
// SAFETY: C's contract is the caller's.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(string: *const u8) -> usize {
    let end: *const u8;
    // SAFETY: as above.
    unsafe {
        asm!("repne scasb", inout("rcx") usize::MAX => _, inout("rdi") string => end, in("al") 0_u8,
            options(nostack, readonly));
    }
    end.addr() - string.addr() - 1
}

/// Referenced by the core library, which was compiled for unwinding; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Referenced like `rust_eh_personality`.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    sys::exit(101)
}
