//! The rules that were defined, in that order: a list that only grows, at its end.
//!
//! Without a lock, as a `fork` while another thread held it would leave it locked in the child for ever;
//! and unlike what [`crate::process`] keeps, the child must find all that its parent had. A rule is in
//! the list by one atomic store, which a fork sees or does not.

use super::{Definition, UserRule};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A rule in the list. Never freed, and not written but for its link.
struct Node {
    rule: UserRule,
    next: Link,
}

/// To the next node; null at the end of the list.
struct Link(AtomicPtr<Node>);

impl Link {
    const fn end() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    fn node(&self) -> Option<&'static Node> {
        // SAFETY: null, or of a node that `set` got, whole and for ever.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }

    /// Appends the node, unless another thread was faster.
    fn set(&self, node: &'static Node) -> bool {
        let node = std::ptr::from_ref(node).cast_mut();
        self.0.compare_exchange(null_mut(), node, Ordering::Release, Ordering::Relaxed).is_ok()
    }
}

static FIRST: Link = Link::end();

/// The rules so far.
pub(super) fn rules() -> impl Iterator<Item = &'static UserRule> {
    std::iter::successors(FIRST.node(), |node| node.next.node()).map(|node| &node.rule)
}

/// The rule of the definition's name; where there is none yet, what it defines.
pub(super) fn find_or_add(definition: &Definition) -> &'static UserRule {
    let mut link = &FIRST;
    // Made once, and left unused where another thread is faster with the same name.
    let mut made: Option<&'static Node> = None;
    loop {
        if let Some(node) = link.node() {
            if node.rule.definition.name == definition.name {
                return &node.rule;
            }
            link = &node.next;
        } else {
            let node = *made.get_or_insert_with(|| {
                let rule = UserRule::new(definition.clone());
                Box::leak(Box::new(Node { rule, next: Link::end() }))
            });
            if link.set(node) {
                return &node.rule;
            }
        }
    }
}
