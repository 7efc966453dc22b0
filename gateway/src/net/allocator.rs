//! The program's allocator: mimalloc, asked in the way that is cheapest for it.

#[cfg(feature = "mimalloc")]
pub use mimalloc::Allocator;

/// Gives memory that this thread has freed back to the system, where the allocator has kept it for longer than a second. It
/// does so by itself only when it is asked for more, and a core whose requests have all become streams that wait asks for
/// nothing.
pub fn give_back() {
    #[cfg(feature = "mimalloc")]
    mimalloc::collect();
}

#[cfg(feature = "mimalloc")]
mod mimalloc {
    use std::alloc::{GlobalAlloc, Layout};

    use ::mimalloc::MiMalloc;

    /// Collects this thread's free pages.
    pub fn collect() {
        // SAFETY: may be called at any time; it looks at this thread's pages and at those that no thread owns.
        unsafe { libmimalloc_sys::mi_collect(false) }
    }

    /// mimalloc. Its crate asks for every block by its alignment, for which mimalloc takes a slow path, and a larger block,
    /// where a size above 1 KiB is no power of two. Blocks are aligned enough for nearly all types anyhow.
    pub struct Allocator;

    /// Alignment of every block, and of those that are at least this size (`MI_MAX_ALIGN_SIZE`, mimalloc's types.h).
    const EVERY: usize = 8;
    const LARGER: usize = 16;

    #[inline]
    fn is_plain(align: usize, size: usize) -> bool {
        align <= EVERY || (align <= LARGER && size >= LARGER)
    }

    // SAFETY: all of it is mimalloc, which frees what any of its functions has allocated; blocks are aligned as asked by
    // `is_plain`.
    unsafe impl GlobalAlloc for Allocator {
        #[inline]
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            if is_plain(layout.align(), layout.size()) {
                // SAFETY: any size is allowed.
                return unsafe { libmimalloc_sys::mi_malloc(layout.size()).cast() };
            }
            // SAFETY: as the caller promises.
            unsafe { MiMalloc.alloc(layout) }
        }

        #[inline]
        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            if is_plain(layout.align(), layout.size()) {
                // SAFETY: any size is allowed.
                return unsafe { libmimalloc_sys::mi_zalloc(layout.size()).cast() };
            }
            // SAFETY: as the caller promises.
            unsafe { MiMalloc.alloc_zeroed(layout) }
        }

        #[inline]
        unsafe fn dealloc(&self, block: *mut u8, _: Layout) {
            // SAFETY: the block is mimalloc's, as the caller promises.
            unsafe { libmimalloc_sys::mi_free(block.cast()) }
        }

        #[inline]
        unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            if is_plain(layout.align(), size) {
                // SAFETY: the block is mimalloc's, as the caller promises, and any size is allowed.
                return unsafe { libmimalloc_sys::mi_realloc(block.cast(), size).cast() };
            }
            // SAFETY: as the caller promises.
            unsafe { MiMalloc.realloc(block, layout, size) }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn blocks_are_aligned_as_asked_and_keep_their_bytes() {
            for align in [1, 2, 4, 8, 16, 32, 64, 4096] {
                for size in (1..200).chain([1000, 1025, 2000, 3000, 4097, 20_000, 100_000]) {
                    let layout = Layout::from_size_align(size, align).expect("a layout");
                    // SAFETY: the layouts are those that the blocks were allocated with, and writes stay within them.
                    unsafe {
                        let block = Allocator.alloc(layout);
                        assert_eq!(block as usize % align, 0, "{size} {align}");
                        block.write_bytes(7, size);
                        let block = Allocator.realloc(block, layout, size * 3);
                        assert_eq!(block as usize % align, 0, "{size} {align}");
                        assert!((0..size).all(|at| block.add(at).read() == 7));
                        let layout = Layout::from_size_align(size * 3, align).expect("a layout");
                        Allocator.dealloc(block, layout);
                        let block = Allocator.alloc_zeroed(layout);
                        assert_eq!(block as usize % align, 0, "{size} {align}");
                        assert!((0..size * 3).all(|at| block.add(at).read() == 0));
                        Allocator.dealloc(block, layout);
                    }
                }
            }
        }
    }
}
