//! Inputs to start from, and words to put into them: what the parsers meet on the wire, and what
//! attacks on them are made of. The fuzz targets include this file too.

/// Request and response heads.
pub const HEADS: &[&[u8]] = &[
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    b"\r\nPOST /v1/chat/completions?a=b HTTP/1.1\r\nHost: gateway:8080\r\nAuthorization: Bearer k\r\n\
      Content-Type: application/json\r\nContent-Length: 5\r\nConnection: keep-alive, X-A\r\nX-A: 1\r\n\r\nhello",
    b"POST http://h:1/a HTTP/1.1\r\nhost: [::1]:80\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n",
    b"OPTIONS * HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nDate: x\r\n\r\n",
    b"HTTP/1.0 200\r\nContent-Length: 12\r\n\r\n",
];

/// Words of heads.
pub const HEAD_WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b" ",
    b"\t",
    b":",
    b"\0",
    b",",
    b"\x0b",
    b"\x7f",
    b"\xff",
    b"\r\nContent-Length: 5",
    b"\r\nContent-Length: 5, 5",
    b"\r\nTransfer-Encoding: chunked",
    b"chunked",
    b"identity",
    b"gzip, chunked",
    b"\r\n folded",
    b"\r\nHost: a",
    b"HTTP/1.0",
    b"HTTP/1.1",
    b"HTTP/2.0",
    b"Connection: close",
    b"Expect: 100-continue",
    b"http://",
    b"#",
    b"+",
    b"0x",
    b"18446744073709551616",
];

/// Chunked bodies.
pub const BODIES: &[&[u8]] = &[
    b"0\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\n",
    b"5;a=\"b\"\r\nhello\r\nA\r\n0123456789\r\n000\r\nX-Sum: 1\r\nY:\r\n\r\n",
    b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n00\r\n\r\n",
];

/// Words of chunked bodies.
pub const BODY_WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"0\r\n\r\n",
    b"1\r\na\r\n",
    b";",
    b";x=y",
    b" ",
    b"\t",
    b"0x1",
    b"+1",
    b"-1",
    b"ffffffffffffffff",
    b"00000000000000001",
    b"\0",
    b"\x7f",
    b"X: y\r\n",
    b"0\r\n",
    b"g",
];

/// Event streams.
pub const STREAMS: &[&[u8]] = &[
    b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\ndata: [DONE]\n\n",
    b"event: message_start\r\ndata: {\"a\":1}\r\n\r\n: ping\r\n\r\nevent:x\r\ndata\r\n\r\n",
    b"\xef\xbb\xbfdata: a\rdata: b\r\revent: x\rid: 1\r\r",
    b"data: a\n\r\ndata: b\r\n\ndata:  c\ndata:d\n\n\n\n",
];

/// Words of event streams.
pub const STREAM_WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"\n\n",
    b"\r\r",
    b"\r\n\r\n",
    b"\n\r",
    b"data:",
    b"data: ",
    b"data",
    b"event: x",
    b":",
    b" ",
    b"\xef\xbb\xbf",
    b"\xef\xbb",
    b"\xef",
    b"id: 1",
    b": c",
];

/// JSON documents.
pub const DOCUMENTS: &[&[u8]] = &[
    b"{}",
    br#"{"model":"fast","messages":[{"role":"user","content":"Say \"hi\"\n\u00e9\ud83d\ude00"}],"stream":true}"#,
    br#" { "a" : [ 1 , -2.5e+3 , [ ] , { } , null , false ] , "b\u0041" : { "c" : "d" } } "#,
    br#"{"n":18446744073709551615,"max_tokens":1e3,"stream_options":{"include_usage":false},"x":"\ud800"}"#,
    "{\"text\":\"日本語 und so weiter, länger als ein paar Wörter von acht Bytes\",\"a\":0}".as_bytes(),
];

/// Words of JSON documents.
pub const DOCUMENT_WORDS: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\"",
    b"\\",
    b"\\\"",
    b"\\u",
    b"\\ud800",
    b"\\udc00",
    b"\\u0041",
    b"\0",
    b"\x1f",
    b"\x7f",
    b"\xc3\xa9",
    b"\xc3",
    b"\xff",
    b"\xed\xa0\x80",
    b"0",
    b"-",
    b"1e5",
    b".",
    b"1.0",
    b"true",
    b"null",
    b"\"a\":1,",
    b" ",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    b"]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",
    b"{\"a\":",
    b"\n",
    b"\x0c",
];

/// PROXY headers of both versions.
pub const PROXIES: &[&[u8]] = &[
    b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 80\r\nGET",
    b"PROXY TCP6 2001:db8::7 ::1 1 65535\r\n",
    b"PROXY UNKNOWN\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x11\x01\x02\x03\x04\x0a\0\0\x01\x30\x39\0\x50\x04\0\x02hi",
    b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
];
/// Their words.
pub const PROXY_WORDS: &[&[u8]] = &[
    b"PROXY ",
    b"TCP4",
    b"TCP6",
    b"UNKNOWN",
    b" ",
    b"\r\n",
    b"192.0.2.7",
    b"::1",
    b"65535",
    b"0",
    b"\r\n\r\n\0\r\nQUIT\n",
    b"\x21",
    b"\x11",
    b"\x31",
    b"\0\x0c",
    b"\x03\0\x04",
    b"\xff\xff",
];
/// Values of X-Forwarded-For and Forwarded.
pub const FORWARDED: &[&[u8]] = &[
    b"192.0.2.7, 10.0.0.1",
    b"for=192.0.2.7;proto=https;by=10.0.0.1, for=\"[2001:db8::1]:4711\"",
    b"unknown, _hidden",
];
/// Their words.
pub const FORWARDED_WORDS: &[&[u8]] = &[
    b"for=",
    b"For=",
    b"by=",
    b"proto=https",
    b";",
    b",",
    b", ",
    b"\"",
    b"\\",
    b"[2001:db8::1]",
    b"192.0.2.7",
    b":80",
    b"unknown",
    b"10.0.0.1",
];
