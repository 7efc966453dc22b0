//! Where clients connect, and which proxies stand before it.

use std::{net::SocketAddr, path::PathBuf};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::config::{
    defaults::TRUSTED_PROXIES_MAX,
    units::{Address, Network},
};

/// An address on which clients are served.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// IP address and port, for example `0.0.0.0:8080` or `[::]:8443`; each at most once.
    #[schemars(with = "Address")]
    pub address: SocketAddr,
    /// Serve HTTPS with this certificate, or with several told apart by the server name (SNI), of
    /// which the first is the default. Absent: plain HTTP.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Proxies before this listener, at most 1024 networks: what they say of their clients is believed, and they are never
    /// dropped by their own address. Whoever is in here can claim any address.
    #[serde(default)]
    #[schemars(with = "Vec<Network>", length(max = TRUSTED_PROXIES_MAX))]
    pub trusted_proxies: Vec<IpNet>,
    /// Whether trusted proxies begin a connection with a PROXY header (version 1 or 2), before TLS. Needs
    /// `trusted_proxies`.
    #[serde(default)]
    pub proxy_protocol: ProxyProtocol,
    /// Which header field of a trusted proxy tells its client.
    #[serde(default)]
    pub client_header: ClientHeader,
}

/// Whether connections begin with a PROXY header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// None does.
    #[default]
    Off,
    /// Those of trusted proxies may; all others do not.
    Optional,
    /// Every one does, and comes from a trusted proxy; others are closed.
    Required,
}

/// Which header field tells the client. A proxy keeps one of them in order and passes on the other as the client sent it,
/// so only one is believed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClientHeader {
    /// `X-Forwarded-For`, as most proxies write it.
    #[default]
    XForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
    /// None: the address of the connection, or of its PROXY header, is the client's.
    Off,
}

/// One certificate or a list of them.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Tls {
    /// One certificate for every server name.
    One(Certificate),
    /// Several certificates; the first answers for unknown server names.
    Several(Vec<Certificate>),
}

impl Tls {
    /// The certificates in their order.
    pub fn certificates(&self) -> &[Certificate] {
        match self {
            Tls::One(certificate) => std::slice::from_ref(certificate),
            Tls::Several(certificates) => certificates,
        }
    }

    pub(in crate::config) fn certificates_mut(&mut self) -> &mut [Certificate] {
        match self {
            Tls::One(certificate) => std::slice::from_mut(certificate),
            Tls::Several(certificates) => certificates,
        }
    }
}

// Serde's own untagged enums lose the place and the reason of an error.
impl<'de> Deserialize<'de> for Tls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tls, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Tls;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a certificate or a list of certificates")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Tls, A::Error> {
                Certificate::deserialize(de::value::MapAccessDeserializer::new(map)).map(Tls::One)
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Tls, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Tls::Several)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A certificate and its private key, both PEM files. They are read at start and at reload.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// File with the certificate, followed by the intermediate ones.
    pub certificate: PathBuf,
    /// File with the private key (PKCS #8, PKCS #1 or SEC 1), not encrypted.
    pub key: PathBuf,
}
