//! What a `fork` does not hand down. A child has one thread: those of a pool are not there, and a lock
//! that another thread held at that moment is never released. So whatever has threads or locks is
//! kept for each process, and a child that needs it makes its own.

use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A value for each process that asks for it. Getting it takes no lock, as a fork might leave that
/// locked.
pub struct PerProcess<T> {
    newest: AtomicPtr<Node<T>>,
    owns: PhantomData<T>,
}

/// A list that grows at its head. Numbers of processes are used again, but not while a child that
/// knows them still shares memory with nobody but its own children: a list holds as many nodes as
/// there were forks in a row, each of which used the value.
struct Node<T> {
    process: u32,
    value: ManuallyDrop<T>,
    next: *mut Node<T>,
}

impl<T: Send + Sync> PerProcess<T> {
    /// Of no process yet.
    pub const fn new() -> Self {
        Self { newest: AtomicPtr::new(null_mut()), owns: PhantomData }
    }

    /// This process' value; where there is none, `make` makes it, from the value of the process that
    /// this one is a fork of.
    pub fn get_or_make(&self, make: impl FnOnce(Option<&T>) -> T) -> &T {
        let process = std::process::id();
        let mut head = self.newest.load(Ordering::Acquire);
        if let Some(value) = Self::find(head, null_mut(), process) {
            return value;
        }
        // SAFETY: nodes live as long as the list, and are not written once they are in it.
        let inherited = unsafe { head.as_ref() }.map(|node| &*node.value);
        let value = ManuallyDrop::new(make(inherited));
        let made = Box::into_raw(Box::new(Node { process, value, next: head }));
        loop {
            let swap =
                self.newest.compare_exchange(head, made, Ordering::AcqRel, Ordering::Acquire);
            // SAFETY: `made` is this call's alone until it is in the list, and then not written.
            unsafe {
                match swap {
                    Ok(_) => return &(*made).value,
                    Err(newer) => {
                        // Another thread of this process was faster, perhaps with the same.
                        if let Some(value) = Self::find(newer, head, process) {
                            ManuallyDrop::drop(&mut (*made).value);
                            drop(Box::from_raw(made));
                            return value;
                        }
                        (*made).next = newer;
                        head = newer;
                    }
                }
            }
        }
    }

    /// The value of `process` among the nodes from `node` on, up to `end`.
    fn find<'a>(mut node: *mut Node<T>, end: *mut Node<T>, process: u32) -> Option<&'a T> {
        while node != end {
            // SAFETY: as above; the caller holds the list.
            let Node { process: of, value, next } = unsafe { &*node };
            if *of == process {
                return Some(value);
            }
            node = *next;
        }
        None
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let mut node = *self.newest.get_mut();
        while !node.is_null() {
            // SAFETY: nobody uses the list any more; each node was made by a Box.
            let mut this = unsafe { Box::from_raw(node) };
            node = this.next;
            // A parent's value is left as it is: to end threads that are not there could take for ever.
            if this.process == std::process::id() {
                // SAFETY: dropped once, here.
                unsafe { ManuallyDrop::drop(&mut this.value) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    struct Counted<'a>(&'a AtomicUsize);

    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn threads_of_a_process_get_the_same_value_and_all_made_are_dropped_once() {
        let (made, dropped) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let values = PerProcess::new();
        let make = |inherited: Option<&Counted>| {
            assert!(inherited.is_none());
            made.fetch_add(1, Ordering::Relaxed);
            Counted(&dropped)
        };
        std::thread::scope(|scope| {
            let get = || std::ptr::from_ref(values.get_or_make(make)) as usize;
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(get)).collect();
            let first = get();
            assert!(threads.into_iter().all(|t| t.join().unwrap() == first));
        });
        drop(values);
        assert_eq!(made.load(Ordering::Relaxed), dropped.load(Ordering::Relaxed));
    }

    #[test]
    fn a_parents_value_is_seen_once_and_never_dropped() {
        let (own, parents) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let mut values = PerProcess::new();
        let inherited = Box::new(Node {
            process: std::process::id().wrapping_add(1),
            value: ManuallyDrop::new(Counted(&parents)),
            next: null_mut(),
        });
        *values.newest.get_mut() = Box::into_raw(inherited);
        for _ in 0..2 {
            values.get_or_make(|inherited| {
                assert!(std::ptr::eq(inherited.unwrap().0, &parents));
                Counted(&own)
            });
        }
        drop(values);
        assert_eq!((own.into_inner(), parents.into_inner()), (1, 0));
    }
}
