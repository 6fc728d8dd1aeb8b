//! The image cache, and what a kernel build needs.

use hearth_images::Images;

use super::Check;
use crate::failure::chain;

pub(super) fn checks() -> Vec<Check> {
    let images = match Images::open(None) {
        Ok(images) => images,
        Err(error) => {
            let text = chain(&error);
            let (found, advice) = text
                .split_once(": ")
                .unwrap_or((&text, "set XDG_CACHE_HOME"));
            return vec![Check::fail("images", found, advice)];
        }
    };
    let cached = images.cached();
    vec![
        tools(&images, cached.kernel.is_some()),
        cache(&images, &cached),
        commands(&images),
    ]
}

fn tools(images: &Images, have_kernel: bool) -> Check {
    let Some(missing) = images.missing_tools() else {
        return Check::ok("build", "all that a kernel build needs is installed");
    };
    let found = format!("a kernel build lacks {}", missing.packages().join(", "));
    let advice = format!("install it with: {}", missing.install_command());
    if have_kernel {
        Check::warn(
            "build",
            format!("{found}, but the kernel is cached"),
            advice,
        )
    } else {
        Check::fail("build", found, advice)
    }
}

fn cache(images: &Images, cached: &hearth_images::Cached) -> Check {
    let dir = images.cache_dir().display();
    let missing = match (&cached.kernel, &cached.initramfs) {
        (Some(kernel), Some(initramfs)) => {
            return Check::ok(
                "images",
                format!("base: {} and {}", kernel.display(), initramfs.display()),
            );
        }
        (Some(_), None) => "the kernel, but not the initramfs with the agent",
        (None, Some(_)) => "the initramfs with the agent, but not the kernel",
        (None, None) => "neither the kernel nor the initramfs with the agent",
    };
    Check::warn(
        "images",
        format!("{dir} holds {missing}"),
        "the first run builds what is missing; or build it now with: hearth image build base",
    )
}

fn commands(images: &Images) -> Check {
    let Some(refused) = images.commands_refused() else {
        return Check::ok("recipes", "recipes with commands can be built");
    };
    let found = format!(
        "recipes with commands cannot be built, others can: no namespaces ({})",
        chain(&refused)
    );
    let advice = "sudo sysctl user.max_user_namespaces=1000; on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0";
    Check::warn("recipes", found, advice)
}
