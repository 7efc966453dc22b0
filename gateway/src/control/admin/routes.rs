//! The routes of the admin API together with their description: a route that is served is in the OpenAPI document, with
//! the types that its handler reads and writes.

use std::sync::Arc;

use axum::{
    Router,
    handler::Handler,
    http::StatusCode,
    routing::{MethodFilter, on},
};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{ErrorAnswer, Plane};

/// What handlers are given.
pub type App = Arc<dyn Plane>;

/// Collects routes and their description.
pub struct Routes {
    router: Router<App>,
    paths: Map<String, Value>,
    generator: SchemaGenerator,
}

/// What one operation is and does.
pub struct Operation {
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    query: Option<fn(&mut SchemaGenerator) -> Value>,
    body: Option<fn(&mut SchemaGenerator) -> Value>,
    answers: Vec<(StatusCode, &'static str, Content)>,
    if_match: bool,
}

/// What an answer holds.
enum Content {
    Json(fn(&mut SchemaGenerator) -> Value),
    Text,
    Nothing,
}

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

/// The schema itself, not a reference to it: its properties become parameters.
fn fields_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    T::json_schema(generator).to_value()
}

impl Operation {
    /// An operation of a tag: `keys`, `teams`, …
    pub fn new(id: &'static str, tag: &'static str, summary: &'static str) -> Operation {
        Operation {
            id,
            tag,
            summary,
            query: None,
            body: None,
            answers: Vec::new(),
            if_match: false,
        }
    }

    /// Takes these parameters behind the `?`.
    pub fn query<T: JsonSchema>(mut self) -> Operation {
        self.query = Some(fields_of::<T>);
        self
    }

    /// Takes this as its JSON body.
    pub fn body<T: JsonSchema>(mut self) -> Operation {
        self.body = Some(schema_of::<T>);
        self
    }

    /// Answers with this as JSON.
    pub fn answer<T: JsonSchema>(mut self, status: StatusCode, what: &'static str) -> Operation {
        self.answers.push((status, what, Content::Json(schema_of::<T>)));
        self
    }

    /// Answers with plain text.
    pub fn text(mut self, what: &'static str) -> Operation {
        self.answers.push((StatusCode::OK, what, Content::Text));
        self
    }

    /// Answers with a head only.
    pub fn no_content(mut self, what: &'static str) -> Operation {
        self.answers
            .push((StatusCode::NO_CONTENT, what, Content::Nothing));
        self
    }

    /// Heeds `If-Match`.
    pub fn if_match(mut self) -> Operation {
        self.if_match = true;
        self
    }

    fn describe(self, path: &str, generator: &mut SchemaGenerator) -> Value {
        let mut parameters: Vec<Value> = path_parameters(path);
        if let Some(query) = self.query {
            parameters.extend(query_parameters(&query(generator)));
        }
        if self.if_match {
            parameters.push(json!({
                "name": "If-Match", "in": "header", "required": false,
                "description": "The `ETag` of the version that is to be changed; another is refused with 412.",
                "schema": { "type": "string", "pattern": "^(\\*|\"[0-9]{1,19}\")$" },
            }));
        }
        let mut responses = Map::new();
        for (status, what, content) in self.answers {
            let mut response = json!({ "description": what });
            match content {
                Content::Json(schema) => {
                    response["content"] = json!({ "application/json": { "schema": schema(generator) } });
                }
                Content::Text => {
                    response["content"] = json!({ "text/plain": { "schema": { "type": "string" } } });
                }
                Content::Nothing => {}
            }
            responses.insert(status.as_str().to_owned(), response);
        }
        responses.insert(
            "default".into(),
            json!({ "$ref": "#/components/responses/Error" }),
        );
        let mut operation = json!({
            "operationId": self.id,
            "tags": [self.tag],
            "summary": self.summary,
            "responses": responses,
        });
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if let Some(body) = self.body {
            operation["requestBody"] = json!({
                "required": true,
                "content": { "application/json": { "schema": body(generator) } },
            });
        }
        operation
    }
}

impl Default for Routes {
    fn default() -> Routes {
        // OpenAPI 3.1 takes JSON Schema as it is.
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        Routes {
            router: Router::new(),
            paths: Map::new(),
            generator: settings.into_generator(),
        }
    }
}

impl Routes {
    /// Serves and describes `GET path`.
    pub fn get<H: Handler<T, App>, T: 'static>(self, path: &str, handler: H, operation: Operation) -> Routes {
        self.add(MethodFilter::GET, "get", path, handler, operation)
    }

    /// Serves and describes `POST path`.
    pub fn post<H: Handler<T, App>, T: 'static>(
        self,
        path: &str,
        handler: H,
        operation: Operation,
    ) -> Routes {
        self.add(MethodFilter::POST, "post", path, handler, operation)
    }

    /// Serves and describes `PUT path`.
    pub fn put<H: Handler<T, App>, T: 'static>(self, path: &str, handler: H, operation: Operation) -> Routes {
        self.add(MethodFilter::PUT, "put", path, handler, operation)
    }

    /// Serves and describes `PATCH path`.
    pub fn patch<H: Handler<T, App>, T: 'static>(
        self,
        path: &str,
        handler: H,
        operation: Operation,
    ) -> Routes {
        self.add(MethodFilter::PATCH, "patch", path, handler, operation)
    }

    /// Serves and describes `DELETE path`.
    pub fn delete<H: Handler<T, App>, T: 'static>(
        self,
        path: &str,
        handler: H,
        operation: Operation,
    ) -> Routes {
        self.add(MethodFilter::DELETE, "delete", path, handler, operation)
    }

    fn add<H: Handler<T, App>, T: 'static>(
        mut self,
        filter: MethodFilter,
        method: &str,
        path: &str,
        handler: H,
        operation: Operation,
    ) -> Routes {
        let described = operation.describe(path, &mut self.generator);
        let operations = self.paths.entry(path).or_insert_with(|| json!({}));
        operations[method] = described;
        self.router = self.router.route(path, on(filter, handler));
        self
    }

    /// The routes, and the OpenAPI document of all that was added.
    pub fn finish(mut self) -> (Router<App>, Value) {
        let error = schema_of::<ErrorAnswer>(&mut self.generator);
        let document = json!({
            "openapi": "3.1.0",
            "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
            "info": {
                "title": "gateway admin API",
                "version": env!("CARGO_PKG_VERSION"),
                "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
            },
            "servers": [{ "url": "/" }],
            "security": [{ "token": [] }],
            "paths": self.paths,
            "components": {
                "schemas": self.generator.take_definitions(true),
                "responses": { "Error": {
                    "description": "What is wrong.",
                    "content": { "application/json": { "schema": error } },
                } },
                "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            },
        });
        (self.router, document)
    }
}

/// `{id}` and the like.
fn path_parameters(path: &str) -> Vec<Value> {
    let names = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    names
        .map(|name| {
            let schema = match name {
                "scope" => json!({ "$ref": "#/components/schemas/Scope" }),
                _ => json!({ "type": "string", "minLength": 1 }),
            };
            json!({ "name": name, "in": "path", "required": true, "schema": schema })
        })
        .collect()
}

/// The properties of a schema, one parameter each.
fn query_parameters(schema: &Value) -> Vec<Value> {
    let required = schema["required"].as_array();
    let is_required = |name: &str| required.is_some_and(|names| names.iter().any(|other| other == name));
    let properties = schema["properties"].as_object().into_iter().flatten();
    properties
        .map(|(name, schema)| {
            let mut parameter = json!({
                "name": name, "in": "query", "required": is_required(name), "schema": schema,
            });
            if schema["description"].is_string() {
                parameter["description"] = schema["description"].clone();
            }
            parameter
        })
        .collect()
}
