//! Which kernels multiply.

use super::super::Scheme;
use crate::format::Dtype;

/// How dW comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mainloop {
    /// The fused kernel of compute capability 9.0: [`super::sm90`].
    Sm90,
    /// The fused kernel of every capability since 8.0: [`super::sm80`].
    Sm80,
    /// Panels of dW in the workspace.
    Panel,
}

/// The environment variable that names another one than the device's own, for measurements.
const OVERRIDE: &str = "FORGE_MAINLOOP";

impl Mainloop {
    /// The one for a device and a scheme. It may still refuse a shape; then panels take it.
    pub fn choose(capability: (i32, i32), scheme: &Scheme) -> Self {
        let own = Self::of_device(capability, scheme);
        if own == Self::Panel {
            return own;
        }
        let Ok(name) = std::env::var(OVERRIDE) else { return own };
        Self::named(&name, capability, scheme.factor_dtype).unwrap_or_else(|| {
            if !name.is_empty() {
                tracing::warn!(
                    target: "forge",
                    "{OVERRIDE}={name}: not sm80, panel, or on compute capability 9.0 sm90; {own:?} is \
                     taken"
                );
            }
            own
        })
    }

    /// The device's own.
    pub fn of_device(capability: (i32, i32), scheme: &Scheme) -> Self {
        match (scheme.factor_dtype, capability) {
            _ if scheme.is_exact() => Self::Panel,
            // The kernel of 9.0 has no way to split factors: they go from memory to the tensor cores.
            (Dtype::Bf16 | Dtype::F16, (9, 0)) => Self::Sm90,
            _ => Self::Sm80,
        }
    }

    /// What the variable says, where the device can do it.
    fn named(name: &str, capability: (i32, i32), factors: Dtype) -> Option<Self> {
        match name {
            "sm90" if capability == (9, 0) && factors != Dtype::F32 => Some(Self::Sm90),
            "sm80" => Some(Self::Sm80),
            "panel" => Some(Self::Panel),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sm90_runs_on_9_0_alone() {
        let named = |name, capability| Mainloop::named(name, capability, Dtype::Bf16);
        assert_eq!(named("sm90", (9, 0)), Some(Mainloop::Sm90));
        assert_eq!(named("sm90", (10, 0)), None);
        assert_eq!(Mainloop::named("sm90", (9, 0), Dtype::F32), None);
        assert_eq!(named("sm80", (9, 0)), Some(Mainloop::Sm80));
        assert_eq!(named("panel", (8, 0)), Some(Mainloop::Panel));
        assert_eq!(named("SM80", (8, 0)), None);
    }
}
