//! Proxies before a listener, and how drops of clients grow.

use super::{MONTH, SECOND, span};
use crate::config::{
    defaults::TRUSTED_PROXIES_MAX,
    load::Report,
    schema::{Drop, ESCALATION_FACTOR_MAX, Listener, ProxyProtocol},
    tree::Path,
};

pub(super) fn check(path: &Path, listener: &Listener, report: &mut Report<'_>) {
    let trusted = &listener.trusted_proxies;
    if listener.proxy_protocol != ProxyProtocol::Off && trusted.is_empty() {
        let message = "needs `trusted_proxies`: a PROXY header of anybody could claim any address";
        report.error(&path.name("proxy_protocol"), message);
    }
    let path = path.name("trusted_proxies");
    if trusted.len() > TRUSTED_PROXIES_MAX {
        let message = format!("{} networks; the most is {TRUSTED_PROXIES_MAX}", trusted.len());
        report.error(&path, message);
    }
    for (index, network) in trusted.iter().enumerate() {
        if network.prefix_len() == 0 {
            let message = "everybody is trusted: any client can claim any address";
            report.warning(&path.index(index), message);
        }
    }
}

pub(super) fn escalation(path: &Path, drop: &Drop, report: &mut Report<'_>) {
    let escalation = &drop.escalation;
    if !(1..=ESCALATION_FACTOR_MAX).contains(&escalation.factor) {
        let message = format!(
            "{} is out of range: 1 to {ESCALATION_FACTOR_MAX}",
            escalation.factor
        );
        report.error(&path.name("factor"), message);
    }
    // A default that is shorter than a long `for` does no harm: it then lasts as long as that.
    let max = path.name("max");
    if report.is_written(&max) {
        span(&max, escalation.max, drop.hold, MONTH, report);
    }
    span(&path.name("forgive"), escalation.forgive, SECOND, MONTH, report);
    span(&path.name("forget"), escalation.forget, SECOND, MONTH, report);
}
